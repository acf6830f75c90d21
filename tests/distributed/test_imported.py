"""An imported model is the same model on any layout."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface_files import import_hf
from megaswitch.checkpoint.manager import load_model_tensors, read_config
from megaswitch.config import ParallelConfig, TrainConfig
from megaswitch.train.parts import Parts
from tests.distributed.equality import Outcome, Training, compare, working_in
from tests.unit.model.hf_reference import switch


def train(checkpoint: Path, parallel: ParallelConfig) -> Outcome:
    """Two steps from the imported weights, on this rank."""

    def load(parts: Parts) -> None:
        grouped = torch.distributed.is_initialized()
        load_model_tensors(checkpoint, parts.weights, distributed=grouped)

    with working_in(torch.float64):
        config = read_config(checkpoint)
        config = dataclasses.replace(
            config,
            parallel=parallel,
            train=TrainConfig(batch_size=8, micro_batch_size=2),
            optim=dataclasses.replace(config.optim, learning_rate=1e-3, schedule="constant"),
        )
        return Training.start(config, prepare=load).steps(2)


@pytest.mark.parametrize("axis", ["tp", "ep", "pp"])
def test_imported_weights_train_on_two_ranks_as_on_one(world, tmp_path, axis):
    hf = switch(vocab_size=102, num_heads=2, tie_word_embeddings=False)
    hf.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    # Stacks are cut between experts, not where ranks cut them.
    import_hf(tmp_path / "hf", tmp_path / "ours", Options(shard_bytes=10_000))
    (alone,) = world.run(1, train, tmp_path / "ours", ParallelConfig())
    outcomes = world.run(2, train, tmp_path / "ours", ParallelConfig(**{axis: 2}))
    assert not compare(outcomes, alone, 1e-9, 1e-6)
