"""Whether a corpus, its tokenizer and a model's vocabulary fit, and what tells corpora apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from megaswitch.data.indexed import TokenizerInfo, TokenStore
from megaswitch.data.span_corruption import EOS_ID
from megaswitch.log import UserError, warn

# Tokens whose ids are checked at open; of a larger corpus so many are sampled. Each sample is
# checked again when it is read.
_ID_CHECK_BUDGET = 1 << 20
_FIRST_TEXT_ID = 3  # pad, EOS and unknown come before it

_FINGERPRINT_WINDOWS = 64
_FINGERPRINT_WINDOW_TOKENS = 1024

_ENDINGS = 1024  # documents whose last token is looked at


def check_vocabulary(
    store: TokenStore, vocab_size: int, num_sentinels: int, tokenizer: TokenizerInfo | None
) -> tuple[int, str | None]:
    """Refuse a corpus that was made for another vocabulary.

    Args:
        store: the corpus; its sidecar knows the tokenizer, or else `tokenizer` does.
        vocab_size: of the model.
        num_sentinels: that samples may use.
        tokenizer: what the user names as the corpus's.

    Returns:
        the id above the first sentinel, and the SHA-256 of the tokenizer, if that is known.

    Raises:
        UserError: if the tokenizer is another one, or its vocabulary or sentinels do not fit.
    """
    prefix, meta = store.prefix, store.meta
    if meta and tokenizer and meta.tokenizer_sha256 != tokenizer.tokenizer_sha256:
        raise UserError(
            f"data.tokenizer (sha256 {tokenizer.tokenizer_sha256[:12]}...) is not the "
            f"tokenizer that '{prefix}' was made with ({meta.tokenizer_sha256[:12]}...). Give "
            "that one, or preprocess again with this one."
        )
    made_with = meta or tokenizer
    if made_with is None:
        warn(
            f"'{prefix}' has no .meta.json and data.tokenizer is not set: its tokenizer is "
            f"taken to have exactly the model's {vocab_size} ids, the top {num_sentinels} of "
            "them sentinels. Set data.tokenizer if the model's vocabulary is padded."
        )
    elif made_with.vocab_size > vocab_size:
        raise UserError(
            f"the model's vocab_size is {vocab_size}, but '{prefix}' was made with a "
            f"tokenizer of {made_with.vocab_size} ids. Raise vocab_size to at least that; a "
            "model that is trained needs a corpus of its own tokenizer."
        )
    elif made_with.num_extra_ids < num_sentinels:
        raise UserError(
            f"num_sentinels is {num_sentinels}, but '{prefix}' was made with a tokenizer of "
            f"{made_with.num_extra_ids} sentinels. Lower it, or preprocess again with more."
        )
    top = vocab_size if made_with is None else made_with.vocab_size
    if top - num_sentinels <= _FIRST_TEXT_ID:
        raise UserError(
            f"a vocabulary of {top} ids has no room for text beside {num_sentinels} sentinels "
            f"and {_FIRST_TEXT_ID} control ids. Raise vocab_size or lower num_sentinels."
        )
    return top, None if made_with is None else made_with.tokenizer_sha256


def check_sentinels(spans: int, num_sentinels: int) -> None:
    """Refuse a row of more masked spans than there are sentinels."""
    if spans > num_sentinels:
        raise UserError(
            f"a row has {spans} masked spans but the tokenizer only {num_sentinels} sentinels. "
            "Lower encoder_length or noise_density, raise mean_span_length, or use a tokenizer "
            "with more sentinels."
        )


def check_ids(store: TokenStore, vocab_size: int, first_sentinel: int | None) -> None:
    """Refuse ids that the model has not, or that text must not contain.

    Args:
        store: the corpus, not empty.
        vocab_size: of the model.
        first_sentinel: the lowest sentinel; None: the corpus may contain sentinels.

    Raises:
        UserError: naming the id.
    """
    low, high = store.native.id_range(_ID_CHECK_BUDGET)
    where = f"'{store.prefix}' contains token id"
    if low < 0:
        raise UserError(f"{where} {low}; ids are never negative. Preprocess it again.")
    if high >= vocab_size:
        raise UserError(
            f"{where} {high}, outside the model's vocabulary of {vocab_size}. Raise vocab_size "
            "to that of the tokenizer the corpus was made with; a model that is trained needs "
            "a corpus of its own tokenizer."
        )
    if first_sentinel is not None and high >= first_sentinel:
        raise UserError(
            f"{where} {high}, but ids from {first_sentinel} on are the sentinels, which text must "
            "not contain. data.tokenizer must be the one the corpus was made with; vocab_size must "
            "count the sentinels on top of the text's ids (T5: 32,000 + 100), or num_sentinels is "
            "too high."
        )


def fingerprint(
    stores: Sequence[TokenStore], tokenizer_sha256: str | None, settings: Mapping[str, object]
) -> str:
    """16 hex digits, equal for equal data: sizes, spot-checked content, digests and settings."""
    digest = hashlib.sha256()
    for store in stores:
        identity = {
            **settings,
            "tokenizer": tokenizer_sha256,
            "tokens": store.num_tokens,
            "dtype": store.dtype.name,
            "content": None if store.meta is None else store.meta.content_sha256,
        }
        digest.update(json.dumps(identity, sort_keys=True).encode())
        count = min(_FINGERPRINT_WINDOW_TOKENS, store.num_tokens)
        last_start = store.num_tokens - count
        for window in range(_FINGERPRINT_WINDOWS):
            start = last_start * window // (_FINGERPRINT_WINDOWS - 1)
            digest.update(store.tokens(start, count).tobytes())
    return digest.hexdigest()[:16]


def ends_in_eos(store: TokenStore) -> bool:
    """True if documents end in EOS, which is then no part of their text; False if none does.

    Some documents, evenly spread, are looked at; the rest are as they are read.

    Raises:
        UserError: if only some do.
    """
    places = np.unique(np.linspace(0, store.num_documents - 1, _ENDINGS).astype(np.int64))
    spans = [store.native.document(int(i)) for i in places if store.num_documents]
    endings = [int(store.tokens(start + count - 1, 1)[0]) for start, count in spans if count]
    with_eos = endings.count(EOS_ID)
    if 0 < with_eos < len(endings):
        raise UserError(
            f"of {len(endings):,} documents of '{store.prefix}', {with_eos:,} end in EOS (id "
            f"{EOS_ID}); all must, or none. Preprocess the corpus again."
        )
    return with_eos > 0
