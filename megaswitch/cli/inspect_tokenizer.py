"""`megaswitch inspect` of a SentencePiece model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

from megaswitch.cli.show import print_fields, size
from megaswitch.data.tokenizer import Tokenizer

_EXAMPLE = "Switch Transformers route 1 token to 1 expert."
_SHOWN = 12


def tokenizer_report(path: Path) -> dict[str, Any]:
    """What a model file holds.

    Raises:
        UserError: it is no SentencePiece model, or not by T5's conventions.
    """
    tokenizer = Tokenizer(path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = model.get_piece_size()
    byte_pieces = [i for i in range(pieces) if model.is_byte(i)]
    text = [
        i
        for i in range(pieces)
        if not (model.is_byte(i) or model.is_control(i) or model.is_unknown(i))
    ]
    middle = len(text) // 2
    ids = tokenizer.encode(_EXAMPLE)
    return {
        "kind": "tokenizer",
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "pieces": pieces,
        "special": {"pad": tokenizer.pad_id, "eos": tokenizer.eos_id, "unk": tokenizer.unk_id},
        "sentinels": {
            "count": tokenizer.num_extra_ids,
            "first": tokenizer.sentinel_id(0),
            "last": tokenizer.sentinel_id(tokenizer.num_extra_ids - 1),
        },
        "byte_fallback": len(byte_pieces) == 256,
        "first_pieces": [model.id_to_piece(i) for i in text[:_SHOWN]],
        "middle_pieces": [model.id_to_piece(i) for i in text[middle : middle + _SHOWN]],
        "example": {"text": _EXAMPLE, "ids": ids, "decoded": tokenizer.decode(ids)},
    }


def print_tokenizer(report: dict[str, Any]) -> None:
    """Show a report of `tokenizer_report` to people."""
    special, sentinels, example = report["special"], report["sentinels"], report["example"]
    yes, no = "yes: no text is lost", "no: unknown characters become <unk>"
    print_fields(
        f"Tokenizer {report['path']}",
        [
            ("vocabulary", f"{report['vocab_size']:,} ids: {report['pieces']:,} pieces of the file "
                           f"and {sentinels['count']} sentinels on top"),
            ("special ids", ", ".join(f"{name} {number}" for name, number in special.items())),
            ("sentinels", f"<extra_id_0> is {sentinels['first']}, "
                          f"<extra_id_{sentinels['count'] - 1}> is {sentinels['last']}"),
            ("byte fallback", yes if report["byte_fallback"] else no),
            ("first pieces", " ".join(report["first_pieces"])),
            ("from the middle", " ".join(report["middle_pieces"])),
            ("example", example["text"]),
            ("  ids", " ".join(map(str, example["ids"]))),
            ("  read back", example["decoded"]),
            ("size", size(report["bytes"])),
            ("SHA-256", report["sha256"]),
        ],
    )  # fmt: skip
