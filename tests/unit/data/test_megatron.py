"""Files of Megatron-Core are read here and ours there, token for token.

The golden pair was written by megatron-core 0.16.1. The long tests need the package itself:
`pip install -e ".[dev,interop]"`, then `pytest -m long tests/unit/data/test_megatron.py`.
"""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from megaswitch.config import load_config
from megaswitch.data.indexed import TYPE_CODES, IndexedWriter, TokenStore
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.trainer import Trainer

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "megatron"
# Documents, each a list of sequences.
DOCUMENTS = [[[7, 8, 9], [10]], [[65_499]], [], [list(range(100, 140)), [1]]]


def write_ours(prefix, documents, dtype):
    with IndexedWriter(prefix, dtype) as writer:
        for sequences in documents:
            for sequence in sequences:
                writer.append(sequence)
            writer.end_document()


def flat(documents):
    return [list(chain(*sequences)) for sequences in documents]


def test_the_golden_pair_of_megatron_is_read():
    store = TokenStore(GOLDEN)
    assert store.dtype == np.uint16
    assert [store.document(i).tolist() for i in range(store.num_documents)] == flat(DOCUMENTS)
    assert store.sequence_lengths(0, store.num_sequences).tolist() == [3, 1, 1, 40, 1]


def test_our_bytes_are_those_of_the_golden_pair(tmp_path):
    write_ours(tmp_path / "ours", DOCUMENTS, "<u2")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == Path(f"{GOLDEN}{suffix}").read_bytes()


@pytest.fixture
def indexed_dataset():
    return pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed"
    )


def write_theirs(indexed_dataset, prefix, documents, dtype):
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def random_documents(top):
    draw = np.random.default_rng(0)
    return [
        [draw.integers(0, top, length).tolist() for length in draw.integers(1, 300, size)]
        for size in draw.integers(0, 5, 200)
    ]


@pytest.mark.long
@pytest.mark.parametrize("dtype", list(TYPE_CODES.values()), ids=lambda dtype: dtype.name)
def test_both_write_the_same_bytes_and_read_each_other(tmp_path, indexed_dataset, dtype):
    documents = random_documents(min(np.iinfo(dtype).max, 1 << 40))
    write_ours(tmp_path / "ours", documents, dtype)
    write_theirs(indexed_dataset, tmp_path / "theirs", documents, dtype.type)
    for suffix in (".bin", ".idx"):
        ours, theirs = (tmp_path / f"{name}{suffix}" for name in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()
    dataset = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    sequences = list(chain(*documents))
    assert [dataset[i].tolist() for i in range(len(dataset))] == sequences
    ends = np.cumsum([0, *map(len, documents)])
    assert dataset.document_indices.tolist() == ends.tolist()
    store = TokenStore(tmp_path / "theirs")
    assert [store.document(i).tolist() for i in range(store.num_documents)] == flat(documents)


@pytest.mark.long
def test_a_corpus_of_megatrons_builder_trains(tmp_path, indexed_dataset, corpus, run_options):
    # The text of `corpus`, written by their builder: training on either is the same.
    weights = []
    for prefix in (corpus, tmp_path / "theirs"):
        if prefix != corpus:
            store = TokenStore(corpus)
            documents = [[store.document(i).tolist()] for i in range(store.num_documents)]
            write_theirs(indexed_dataset, prefix, documents, np.uint16)
        options = [o for o in run_options if not o.startswith(("--data.train", "--train.run_dir"))]
        options += [f"--data.train={prefix}", f"--train.run_dir={tmp_path / prefix.name}"]
        config = load_config(None, [*options, "--train.device=cpu"])
        trainer = Trainer.build(config, Mesh.start("cpu"))
        assert trainer.fit()
        model = trainer.parts.models[0]
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, parameter in weights[0].items():
        assert torch.equal(parameter, weights[1][name]), name
