"""Megatron's `preprocess_data.py`, for fingers that remember it; see `megaswitch preprocess`.

Writes PREFIX_KEY_document.bin and .idx for each JSON key. Documents are shuffled, as training reads
them in their order, unless --keep-sequential-samples is given.
"""

import argparse
from glob import glob
from pathlib import Path

from megaswitch.data.preprocess import preprocess
from megaswitch.log import UserError, info

TOKENIZERS = ("SentencePieceTokenizer", "T5SentencePieceTokenizer", "T5Tokenizer")
WITHOUT_EFFECT = {
    "partitions": "no file needs to be cut in parts: all workers share each",
    "log_interval": "progress and the time left are shown by the clock",
}
REFUSED = {
    "split_sentences": "T5 masks spans of flat text, which has no sentences",
    "keep_newlines": "it belongs to --split-sentences, and newlines are the tokenizer's business",
    "lang": "it belongs to --split-sentences",
    "vocab_file": "it belongs to WordPiece and BPE; give --tokenizer-model",
    "merge_file": "it belongs to BPE; give --tokenizer-model",
}


def parser() -> argparse.ArgumentParser:
    """Megatron's flags."""
    flags = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    flags.add_argument("--input", nargs="+", required=True, help="files, or patterns in quotes")
    flags.add_argument("--output-prefix", type=Path, required=True)
    flags.add_argument("--json-keys", nargs="+", default=["text"], help="one corpus for each")
    flags.add_argument("--tokenizer-type", default=TOKENIZERS[0], help=", ".join(TOKENIZERS))
    flags.add_argument("--tokenizer-model", type=Path, help="SentencePiece's; needed")
    flags.add_argument("--vocab-extra-ids", type=int, default=100, help="sentinels; T5 has 100")
    flags.add_argument("--append-eod", action="store_true", help="end documents with EOS, as T5")
    flags.add_argument("--workers", type=int, default=1)
    flags.add_argument("--dataset-impl", choices=["mmap"], default="mmap")
    flags.add_argument("--keep-sequential-samples", action="store_true", help="do not shuffle")
    for name, reason in WITHOUT_EFFECT.items():
        flags.add_argument(_flag(name), type=int, help=f"has no effect: {reason}")
    for name, reason in REFUSED.items():
        flags.add_argument(_flag(name), nargs="?", const=True, help=f"refused: {reason}")
    return flags


def main(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be done, then preprocess each key."""
    if arguments.tokenizer_type not in TOKENIZERS:
        raise UserError(
            f"--tokenizer-type {arguments.tokenizer_type} is none of {', '.join(TOKENIZERS)}: "
            "Switch and T5 models read SentencePiece, whose pad, EOS and unknown are 0, 1 and 2."
        )
    if arguments.vocab_extra_ids < 0:
        raise UserError(f"--vocab-extra-ids is {arguments.vocab_extra_ids}; it must be 0 or more.")
    refused = [name for name in REFUSED if getattr(arguments, name) is not None]
    if refused:
        raise UserError("\n".join(f"{_flag(n)} is refused: {REFUSED[n]}." for n in refused))
    if arguments.tokenizer_model is None:
        raise UserError("--tokenizer-model is missing; give the path of a SentencePiece model.")
    for name, reason in WITHOUT_EFFECT.items():
        if getattr(arguments, name) is not None:
            info(f"note: {_flag(name)} has no effect: {reason}")
    for key in arguments.json_keys:
        preprocess(
            [path for pattern in arguments.input for path in _files(pattern)],
            Path(f"{arguments.output_prefix}_{key}_document"),
            arguments.tokenizer_model,
            workers=arguments.workers,
            text_field=key,
            append_eos=arguments.append_eod,
            shuffle=not arguments.keep_sequential_samples,
            num_extra_ids=arguments.vocab_extra_ids,
        )


def _files(pattern: str) -> list[Path]:
    """A file by its name, or those of a pattern, sorted."""
    if Path(pattern).exists():
        return [Path(pattern)]
    return [Path(path) for path in sorted(glob(pattern))] or [Path(pattern)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    flags = parser()
    try:
        main(flags.parse_args())
    except (UserError, OSError) as error:
        flags.exit(2, f"error: {error}\n")
