"""Texts of a model that lies on several ranks are those of one process."""

import io
import json
import math
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass

import pytest
import torch

from megaswitch.cli.generate import _completions, _Shown, _stream
from megaswitch.config import ModelConfig, MoEConfig, ParallelConfig, RunConfig
from megaswitch.data.span_corruption import EOS_ID
from megaswitch.log import UserError
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.generate import Decoding
from megaswitch.train.lockstep import Lockstep
from megaswitch.train.parts import Parts, build_parts
from megaswitch.train.text import Completion, TextGenerator
from tests.distributed.equality import CPU, Routings
from tests.distributed.layouts import Grid, case
from tests.distributed.test_evaluate import launch

BATCH, MAX_TOKENS = 2, 9
# Of different lengths. On most meshes some ranks have none of the last ones.
PROMPTS = [" ".join(str(2 + (7 * i + j * j) % 26) for j in range(3 + i % 4)) for i in range(11)]
SETTINGS = [
    Decoding(max_tokens=MAX_TOKENS),
    Decoding(max_tokens=MAX_TOKENS, cache=False),
    Decoding(max_tokens=MAX_TOKENS, temperature=1.3, top_p=0.9, seed=4),
    Decoding(max_tokens=MAX_TOKENS, beams=3),
    Decoding(max_tokens=MAX_TOKENS, beams=2, early_stopping=True, cache=False),
]
LAYOUTS = ["ep2", "tp2", "ep4", "tp4", "ep2·tp2", "edp2·ep2", "edp2·tp2", "ep4·tp2", "edp2·ep4"]
LAYOUTS += ["edp2·ep2·tp2"]
MODELS = {
    "capacity": {"moe": {"capacity_mode": "group"}},
    "hf": {"moe": {"capacity_mode": "hf", "hf_capacity": 2}, "tie_embeddings": False,
           "activation": "gated-gelu"},
}  # fmt: skip


class Numbers:
    """A tokenizer whose texts are token ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, row: list[int]) -> str:
        end = row.index(EOS_ID) + 1 if EOS_ID in row else len(row)
        return " ".join(map(str, row[:end]))


def run_config(model: str, grid: Grid) -> RunConfig:
    changes = dict(MODELS[model])
    moe = {"num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    return RunConfig(
        model=ModelConfig(
            vocab_size=29, d_model=16, d_kv=4, d_ff=32, num_heads=4, num_encoder_layers=2,
            num_decoder_layers=2, moe=MoEConfig(**moe, **changes.pop("moe")), **changes,
        ),
        parallel=ParallelConfig(ep=grid.ep, tp=grid.tp, sequence_parallel=False),
    )  # fmt: skip


def built(config: RunConfig) -> tuple[Mesh, Parts]:
    grouped = torch.distributed.is_initialized()
    mesh = Mesh.over_ranks(CPU, config.parallel) if grouped else Mesh(0, 1, CPU, None)
    parts = build_parts(config, mesh, training=False)
    parts.initialize(5)
    parts.train(False)
    # The end of a text is likely enough to come early in some and late in others.
    head = parts.weights["embedding.weight" if config.model.tie_embeddings else "head.weight"]
    rows = head.block.slices[0]
    if rows.start <= EOS_ID < rows.stop:
        with torch.no_grad():
            head.local[EOS_ID - rows.start] *= 3.5
    return mesh, parts


def complete(config: RunConfig) -> list[list[Completion]]:
    """Answers to all prompts with each of the settings."""
    mesh, parts = built(config)
    return [
        list(_completions(TextGenerator(parts.models[0], Numbers(), one), PROMPTS, BATCH, mesh))
        for one in SETTINGS
    ]


@dataclass
class Alone:
    """What one process answers, and how clear its decisions are."""

    answers: list[list[Completion]]
    margin: float


def complete_alone(config: RunConfig) -> Alone:
    mesh, parts = built(config)
    routings = Routings(parts)
    gaps = []
    step = Lockstep.step

    def look(self, tokens):
        logits = step(self, tokens)
        best, second = logits.topk(2).values.unbind(-1)
        gaps.append(float((best - second).min()))
        return logits

    Lockstep.step = look
    try:
        answers = [
            list(_completions(TextGenerator(parts.models[0], Numbers(), one), PROMPTS, BATCH, mesh))
            for one in SETTINGS
        ]
    finally:
        Lockstep.step = step
    return Alone(answers, min(routings.margin, *gaps))


@pytest.fixture(scope="module", params=MODELS)
def alone(request, world) -> tuple[str, Alone]:
    (found,) = world.run(1, complete_alone, run_config(request.param, Grid()))
    # No choice sits on a tie, and texts of ranks that work together end at different times.
    assert found.margin > 1e-5
    for answers in found.answers:
        steps = [
            max(len(answer.output.split()) for answer in answers[start : start + BATCH])
            for start in range(0, len(answers), BATCH)
        ]
        assert min(steps) < max(steps), steps
    return request.param, found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_give_the_texts_of_one_process(world, alone, layout):
    model, expected = alone
    grid = case(layout).grid
    for rank, found in enumerate(world.run(grid.ranks, complete, run_config(model, grid))):
        for ours, theirs, settings in zip(found, expected.answers, SETTINGS, strict=True):
            texts = [(answer.prompt, answer.output) for answer in ours]
            assert texts == [(answer.prompt, answer.output) for answer in theirs], (rank, settings)
            scores = [answer.score for answer in ours]
            assert scores == pytest.approx([a.score for a in theirs], rel=1e-4), (rank, settings)


def streamed(config: RunConfig, prompt: str) -> str:
    mesh, parts = built(config)
    writer = TextGenerator(parts.models[0], Numbers(), Decoding(max_tokens=MAX_TOKENS))
    with redirect_stdout(io.StringIO()) as shown:
        _stream(writer, _Shown(raw=False, as_json=False), prompt, mesh)
    return shown.getvalue()


def test_rank_zero_shows_a_text_as_it_grows(world):
    (expected,) = world.run(1, streamed, run_config("hf", Grid()), PROMPTS[1])
    assert expected.strip()
    for layout in ("ep2·tp2", "edp2·ep2"):
        grid = case(layout).grid
        found = world.run(grid.ranks, streamed, run_config("hf", grid), PROMPTS[1])
        assert found == [expected] + [""] * (grid.ranks - 1)


def spoilt(config: RunConfig, token: int, decoding: Decoding) -> str:
    """What a rank says when a token that some prompt has is NaN to the model."""
    mesh, parts = built(config)
    embedding = parts.weights["embedding.weight"]
    rows = embedding.block.slices[0]
    if rows.start <= token < rows.stop:
        with torch.no_grad():
            embedding.local[token - rows.start] = math.nan
    writer = TextGenerator(parts.models[0], Numbers(), decoding)
    try:
        list(_completions(writer, ["5 6", "7 8", f"9 {token}", "9 5"], 1, mesh))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("layout", ["ep2·tp2", "ep4"])
@pytest.mark.parametrize("settings", [{}, {"beams": 2}, {"max_tokens": 1}], ids=str)
def test_ranks_refuse_together_what_one_of_them_finds(world, layout, settings):
    grid = case(layout).grid
    decoding = Decoding(**{"max_tokens": MAX_TOKENS, **settings})
    config = run_config("hf", grid)
    for message in world.run(grid.ranks, spoilt, config, 28, decoding):
        assert message.startswith("the model's logits are NaN or infinite"), message
        assert message.count("NaN") == 1


# Runs the command line with a rank that dies, or finds no memory, in its fifth Switch layer.
TROUBLE = """
import os, signal, sys
from megaswitch.cli import main
from megaswitch.model.moe import SwitchFFN

kind = sys.argv.pop(1)
forward, calls = SwitchFFN.forward, []

def fail(*arguments):
    calls.append(1)
    if len(calls) == 5 and os.environ["RANK"] == "1":
        if kind == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
    return forward(*arguments)

SwitchFFN.forward = fail
main()
"""


@pytest.mark.parametrize("kind", ["dies", "has no memory"])
@pytest.mark.parametrize("command", ["evaluate", "generate"])
def test_a_rank_in_trouble_ends_the_job_with_a_message(text_run, tmp_path, command, kind):
    script = tmp_path / "trouble.py"
    script.write_text(TROUBLE)
    what = [f"{text_run}/texts.jsonl"] if command == "evaluate" else ["bada <extra_id_0>", "mono"]
    process = launch(2, tmp_path, script, kind, command, text_run / "run", *what, "--ep", 2)
    assert process.returncode != 0
    (message,) = re.findall("^error: the job ends: (.*)$", process.stderr, re.MULTILINE)
    phase = "evaluation" if command == "evaluate" else "decoding"
    assert re.search(rf"rank 0 waits in all_to_all_single over ep \({phase}\)", message)
    if kind == "dies":
        assert message.startswith("rank 1 does not answer (gone or stopped); ")
    else:
        assert message.startswith("rank 1 is in ")
        assert "Rank 1 reports: MemoryError: there is not enough memory: " in message
    # A rank that was killed could not tidy up.
    assert len(list((tmp_path / "tmp").glob("megaswitch-*"))) <= (kind == "dies")


def test_the_command_gives_the_texts_of_one_process(text_run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    lines = [json.loads(line)["text"] for line in (text_run / "texts.jsonl").open()][:7]
    prompts.write_text("\n".join(f"{line[:30]} <extra_id_0> {line[40:60]}" for line in lines))
    command = ["-m", "megaswitch", "generate", text_run / "run", "--input", prompts, "--json"]
    command += ["--batch-size", 2, "--max-tokens", 8]
    answers = []
    for ranks, options in ((1, []), (4, ["--ep", 2, "--tp", 2])):
        process = launch(ranks, tmp_path, *command, *options)
        assert process.returncode == 0, process.stderr
        answers.append([json.loads(line) for line in process.stdout.splitlines()])
    one, four = answers
    assert len(one) == 7
    for ours, theirs in zip(four, one, strict=True):
        assert ours | {"score": 0} == theirs | {"score": 0}
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


def test_prompts_cannot_be_typed_into_several_processes(text_run):
    leader, follower = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
         "megaswitch", "generate", text_run / "run", "--tp", "2"],
        stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    errors = process.communicate(timeout=240)[1]
    os.close(leader)
    os.close(follower)
    assert process.returncode != 0
    assert "error: prompts cannot be typed into 2 processes: give them as arguments" in errors
