"""The files that Hugging Face's tokenizers load, from a SentencePiece model.

`tokenizer.json` is written out in full, as HF's own conversion of `spiece.model` for T5 leaves out
the pieces for single bytes. Source: T5's conventions as in `data/tokenizer.py`, and the JSON format
of the `tokenizers` library.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from megaswitch.data.tokenizer import SENTINEL
from megaswitch.log import UserError

_EXTRA_IDS = 100


def tokenizer_files(model: bytes) -> dict[str, bytes]:
    """Files by name with which `AutoTokenizer` gives the ids that our `Tokenizer` gives, plus EOS.

    Args:
        model: content of a SentencePiece model that `Tokenizer` accepts.

    Raises:
        UserError: it is no unigram model, as T5's are.
    """
    from sentencepiece import sentencepiece_model_pb2

    message: Any = sentencepiece_model_pb2
    proto = message.ModelProto.FromString(model)
    if proto.trainer_spec.model_type != proto.trainer_spec.UNIGRAM:
        raise UserError(
            "the tokenizer is no unigram model, and only those can be written for Hugging Face; "
            "remove tokenizer.model from a copy of the checkpoint to convert the tensors alone"
        )
    kinds = type(proto.pieces[0])
    vocabulary = [(piece.piece.removeprefix("▁") if SENTINEL.search(piece.piece) else piece.piece,
                   piece.score) for piece in proto.pieces]  # fmt: skip
    if not SENTINEL.fullmatch(vocabulary[-1][0]):
        vocabulary += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(_EXTRA_IDS))]
    names = [proto.pieces[i].piece for i in range(3)]
    special = dict(enumerate(names)) | {
        i: name for i, (name, _) in enumerate(vocabulary) if SENTINEL.fullmatch(name)
    }
    by_bytes = any(piece.type == kinds.BYTE for piece in proto.pieces)
    charsmap = proto.normalizer_spec.precompiled_charsmap
    content = _tokenizer_json(vocabulary, special, charsmap, by_bytes)
    sentinels = sorted((n for i, n in special.items() if i > 2), key=lambda n: int(n[10:-1]))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names[0],
        "eos_token": names[1],
        "unk_token": names[2],
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "spiece.model": model,
        "tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def _tokenizer_json(
    vocabulary: list[tuple[str, float]], special: dict[int, str], charsmap: bytes, by_bytes: bool
) -> dict[str, Any]:
    spaces = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    normalizers: list[dict[str, Any]] = []
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    eos = special[1]
    end = {"SpecialToken": {"id": eos, "type_id": 0}}
    first, second = ({"Sequence": {"id": part, "type_id": 0}} for part in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, name in sorted(special.items())
        ],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "WhitespaceSplit"}, spaces],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, end],
            "pair": [first, end, second, end],
            "special_tokens": {eos: {"id": eos, "ids": [1], "tokens": [eos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [*([{"type": "ByteFallback"}] if by_bytes else []), spaces],
        },
        "model": {
            "type": "Unigram",
            "unk_id": 2,
            "vocab": [list(entry) for entry in vocabulary],
            "byte_fallback": by_bytes,
        },
    }  # fmt: skip
