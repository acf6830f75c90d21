"""What several suites need: a small corpus, and a run over it that takes a second."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from megaswitch.data.indexed import IndexedWriter, TokenizerInfo

VOCAB_SIZE = 192
SENTINELS = 100

# Triton's kernels run without a GPU, if this is set before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Models this small gain nothing from a second thread, and lose much where the cores are shared.
torch.set_num_threads(1)


def write_corpus(prefix: Path, tokens: int = 20_000, *, seed: int = 0) -> Path:
    """Write text in which each token mostly decides the next, so that there is much to learn."""
    generator = np.random.default_rng(seed)
    low, high = 3, VOCAB_SIZE - SENTINELS
    successor = np.random.default_rng(1).permutation(np.arange(low, high))
    text = np.empty(tokens, dtype=np.int64)
    text[0] = low
    surprises = generator.random(tokens) < 0.1
    random = generator.integers(low, high, tokens)
    for i in range(1, tokens):
        text[i] = random[i] if surprises[i] else successor[text[i - 1] - low]
    info = TokenizerInfo("0" * 64, VOCAB_SIZE, SENTINELS)
    with IndexedWriter(prefix, np.uint16, tokenizer=info) as writer:
        for document in text.reshape(-1, 100):
            writer.add_document(document)
    return prefix


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a corpus of 20,000 tokens; `<prefix>-valid` has 4,000 more."""
    prefix = tmp_path_factory.mktemp("corpus") / "tokens"
    write_corpus(prefix)
    write_corpus(prefix.with_name("tokens-valid"), 4_000, seed=7)
    return prefix


@pytest.fixture
def run_options(corpus: Path, tmp_path: Path) -> list[str]:
    """Overrides of a tiny Switch model's run in `tmp_path/run`."""
    return [
        f"--model.vocab_size={VOCAB_SIZE}",
        "--model.d_model=32",
        "--model.d_kv=8",
        "--model.d_ff=64",
        "--model.num_heads=4",
        "--model.num_encoder_layers=2",
        "--model.num_decoder_layers=2",
        "--model.moe.num_experts=4",
        "--model.moe.group_size=128",
        f"--data.train={corpus}",
        f"--data.valid={corpus}-valid",
        "--data.encoder_length=64",
        "--optim.learning_rate=0.05",
        "--optim.schedule=constant",
        "--optim.warmup_steps=4",
        f"--train.run_dir={tmp_path / 'run'}",
        "--train.batch_size=8",
        "--train.micro_batch_size=4",
        "--train.steps=12",
        "--train.log_interval=1",
        "--train.valid_interval=6",
        "--train.valid_samples=10",
    ]


@pytest.fixture(scope="session")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps on made-up text, in `run`, and what it was made from.

    `texts.jsonl` has documents with fields text and lang, `spm.model` is the tokenizer and `valid`
    the prefix of a held-out corpus of the same text.
    """
    from megaswitch.config import load_config
    from megaswitch.data.preprocess import preprocess
    from megaswitch.data.tokenizer import train_tokenizer
    from megaswitch.parallel.mesh import Mesh
    from megaswitch.train.trainer import Trainer

    folder = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(400)]
    with (folder / "texts.jsonl").open("w") as file:
        for number in range(240):
            # Language "b" uses other words than "a", and one document in twelve has none.
            half = words[:200] if number % 3 else words[200:]
            record = {"text": " ".join(draw.choices(half, k=30))}
            if number % 12 != 11:
                record["lang"] = "a" if number % 3 else "b"
            file.write(json.dumps(record) + "\n")
    train_tokenizer([folder / "texts.jsonl"], folder / "spm.model", vocab_size=500)
    preprocess([folder / "texts.jsonl"], folder / "valid", folder / "spm.model")
    options = [
        *("--model.vocab_size=512", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=64"),
        *("--model.num_heads=4", "--model.num_encoder_layers=2", "--model.num_decoder_layers=2"),
        *("--model.moe.num_experts=4", "--model.moe.group_size=128", "--data.encoder_length=64"),
        *(f"--data.train={folder}/valid", f"--data.valid={folder}/valid"),
        *(f"--data.tokenizer={folder}/spm.model", f"--train.run_dir={folder}/run"),
        *("--train.batch_size=4", "--train.micro_batch_size=4", "--train.steps=3"),
        *("--optim.learning_rate=0.05", "--optim.schedule=constant", "--optim.warmup_steps=0"),
        *("--train.valid_samples=30", "--train.device=cpu", "--train.seed=5"),
    ]
    assert Trainer.build(load_config(None, options), Mesh.start("cpu")).fit()
    return folder
