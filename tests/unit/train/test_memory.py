"""What is said of too little memory, and whom it ends."""

import pytest
import torch

from megaswitch.config import load_config
from megaswitch.log import UserError
from megaswitch.optim.build import build_optimizer
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.memory import TrainingMemory, enough_memory
from megaswitch.train.parts import build_parts


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA"), RuntimeError("can't allocate memory")]
)
@pytest.mark.parametrize(("alone", "kind"), [(True, UserError), (False, MemoryError)])
def test_a_failed_allocation_gets_a_remedy(error, alone, kind):
    with (
        pytest.raises(kind, match="not enough memory: take less"),
        enough_memory("take less", alone=alone),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="something else"), enough_memory("take less"):
        raise RuntimeError("something else")


def config(*options):
    return load_config(None, ["--model.moe.num_experts=8", "--model.moe.group_size=1024", *options])


def test_remedies_are_those_that_are_left():
    alone = Mesh(0, 1, torch.device("cpu"), None)
    plain = TrainingMemory(config("--train.micro_batch_size=8"), alone).remedies()
    assert plain == [
        "train.activation_checkpointing='selective' (recomputes what is cheap)",
        "train.activation_checkpointing=true (about a third more work)",
        "train.micro_batch_size=4 instead of 8",
        "train.precision='bf16'",
        "more ranks, and parallel.ep=2",
    ]
    # Two rows make a routing group, so no micro-batch has fewer.
    least = config("--train.micro_batch_size=2", "--train.batch_size=2", "--train.precision=bf16",
                   "--train.activation_checkpointing=true", "--optim.name=adamw",
                   "--optim.learning_rate=1e-4")  # fmt: skip
    assert TrainingMemory(least, alone).remedies() == [
        "optim.name='adafactor' (states of a few numbers a row)",
        "more ranks, and parallel.ep=2",
    ]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_run_that_does_not_fit_on_a_gpu_says_what_it_held(monkeypatch, tmp_path, recorded):
    calls = []
    memory = torch.cuda.memory
    monkeypatch.setattr(memory, "_record_memory_history", lambda **kw: calls.append(kw))
    monkeypatch.setattr(memory, "_dump_snapshot", lambda path: calls.append(path))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 4 << 30))
    run = config("--model.preset=switch-tiny")
    parts = build_parts(run, Mesh(0, 1, torch.device("meta"), None))
    optimizer = build_optimizer(parts.parameters(), run.optim)
    mesh = Mesh(0, 1, torch.device("cuda"), None)
    training = TrainingMemory(run, mesh, tmp_path / "profile" if recorded else None)
    training.holds(parts, optimizer)
    with pytest.raises(UserError) as caught, training.explained():
        raise torch.OutOfMemoryError("CUDA out of memory")
    text = str(caught.value)
    assert "this run does not fit into the memory of its cuda device. It held weights 0.0" in text
    assert "of 4.00 GiB" in text
    assert "train.activation_checkpointing=true" in text
    path = tmp_path / "profile/memory-rank0.pickle"
    if recorded:
        assert calls == [{"max_entries": 100_000}, str(path), {"enabled": None}]
        assert str(path) in text
    else:
        assert calls == []
        assert "train --profile" in text
