"""Small generated corpora and one trained tokenizer for the data suite."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megaswitch.data.indexed import IndexedWriter, TokenizerInfo
from megaswitch.data.tokenizer import Tokenizer, train_tokenizer

NUM_SENTINELS = 100
TOKENIZER_VOCAB = 600


def _make_text(documents: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(generator.choices(syllables, k=generator.randint(1, 4))) for _ in range(400)]
    return [
        " ".join(generator.choices(words, k=generator.randint(5, 60))).capitalize() + "."
        for _ in range(documents)
    ]


@pytest.fixture(scope="session")
def make_text() -> Callable[..., list[str]]:
    """Generates so many documents of made-up words."""
    return _make_text


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    text.write_text("\n\n".join(_make_text(300)), encoding="utf-8")
    train_tokenizer([text], folder / "t.model", vocab_size=TOKENIZER_VOCAB)
    return folder / "t.model"


@pytest.fixture
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path, NUM_SENTINELS)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Writes a corpus of ids counting up from 3 and returns its prefix."""

    def make(
        tokens: int,
        *,
        top: int = 1000,
        dtype: str = "<u2",
        tokenizer: TokenizerInfo | None = None,
        name: str = "corpus",
    ) -> Path:
        ids = 3 + np.arange(tokens) % (top - 3)
        with IndexedWriter(tmp_path / name, dtype, tokenizer=tokenizer) as writer:
            for start in range(0, tokens, 700):
                writer.add_document(ids[start : start + 700])
        return tmp_path / name

    return make
