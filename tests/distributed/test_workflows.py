"""Every workflow under every layout and with every router, on numbers that one process agrees with.

Other tests look at each part closely; here they meet: a model is pre-trained and stopped and goes
on, is fine-tuned, teaches a dense student, which is upcycled and trained on; its experts are
counted and pruned, and what is left writes text.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from megaswitch.checkpoint.prune import prune
from megaswitch.checkpoint.upcycle import Recipe, upcycle
from megaswitch.cli.evaluate import _as_json
from megaswitch.cli.generate import _completions
from megaswitch.config import MoEConfig, RunConfig, load_config
from megaswitch.model.routers import ROUTERS
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.cache_logits import cache_logits
from megaswitch.train.evaluate import Request, evaluate
from megaswitch.train.evaluate_tasks import TaskRequest, evaluate_tasks
from megaswitch.train.finetune import finetune_config
from megaswitch.train.generate import Decoding
from megaswitch.train.metrics import read_metrics
from megaswitch.train.text import TextGenerator, checkpoint_tokenizer
from megaswitch.train.trained import load_trained
from megaswitch.train.trainer import Trainer
from tests.distributed.equality import CPU, working_in
from tests.unit.train.conftest import tasks  # noqa: F401  a fixture

# Ranks and options of each layout.
LAYOUTS = {
    "alone": (1, []),
    "ep2": (2, ["parallel.ep=2"]),
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "zero": (2, ["parallel.zero=full"]),
}
MODELS = {
    "switch": ["model.moe.router=switch"],
    "top-2": ["model.moe.router=top-2"],
    "ntlb": ["model.moe.router=ntlb", "model.moe.rounds=2"],
    # In a decoder it could not generate.
    "expert-choice": ["model.moe.router=expert-choice", "model.moe.encoder_sparse_step=1",
                      "model.moe.decoder_sparse_step=0"],
    "attention": ["model.moe.attention=linear"],
}  # fmt: skip
ROWS = 8  # of a batch
BOUND = 1e-8  # of sums in fp64 over a few steps


def joined(config: RunConfig) -> Mesh:
    grouped = torch.distributed.is_initialized()
    return Mesh.over_ranks(CPU, config.parallel) if grouped else Mesh(0, 1, CPU, None)


def fit(config: RunConfig) -> None:
    assert Trainer.build(config, joined(config)).fit()


class Workflows:
    """All of them with one model under one layout, on this rank.

    Args:
        text: folder of `text_run`.
        files: folder of the fixture `tasks`.
        folder: for the runs.
        layout: a key of `LAYOUTS`.
        model: a key of `MODELS`.
    """

    def __init__(self, text: Path, files: Path, folder: Path, layout: str, model: str) -> None:
        self.text, self.tasks, self.folder = text, files, folder
        self.ranks, own = LAYOUTS[layout]
        self.pipeline = layout == "pp2"
        # Evaluation knows expert and tensor parallelism; other ranks share the samples.
        axes = {key: 2 for key in ("ep", "tp") if f"parallel.{key}=2" in own}
        self.spread = {"ep": 1, "tp": 1, **axes}
        self.moe = ["model.moe.num_experts=4", "model.moe.group_size=128", *MODELS[model]]
        rows = f"train.micro_batch_size={ROWS // (2 if layout in ('ep2', 'zero', 'pp2') else 1)}"
        self.shared = [
            *own, rows, f"train.batch_size={ROWS}", "train.log_interval=1", "train.device=cpu",
            "train.valid_samples=8", f"data.tokenizer={text}/spm.model",
            "optim.learning_rate=0.02", "optim.schedule=constant", "optim.warmup_steps=0",
        ]  # fmt: skip
        self.small = [
            "model.vocab_size=512", "model.d_model=32", "model.d_kv=8", "model.d_ff=64",
            "model.num_heads=4", "model.num_encoder_layers=2", "model.num_decoder_layers=2",
            f"data.train={text}/valid", f"data.valid={text}/valid", "data.encoder_length=64",
        ]  # fmt: skip

    def words(self, name: str, steps: int, *more: str) -> list[str]:
        """Of a run in the folder `name`."""
        run = [f"train.run_dir={self.folder}/{name}", f"train.steps={steps}"]
        return [f"--{word}" for word in (*self.shared, *more, *run)]

    def run(self, name: str, steps: int, *more: str) -> None:
        words = self.words(name, steps, *self.small, *more)
        fit(load_config(None, words, world_size=self.ranks))

    def train(self) -> None:
        """Pre-train and fine-tune, both in two legs."""
        for steps in (2, 3):
            self.run("switch", steps, *self.moe)
        sources = [
            f"data.{split}.{name}={self.tasks}/{name}_{split}.jsonl"
            for split in ("train", "valid")
            for name in ("lang", "first")
        ]
        more = [
            f"train.init_from={self.folder}/switch", f"data.tasks.lang={self.tasks}/lang.toml",
            "data.encoder_length=32", "data.decoder_length=8", "train.valid_interval=1", *sources,
            # Stages of a pipeline do not write answers while they train.
            *(["train.valid_metrics=false"] if self.pipeline else []),
        ]  # fmt: skip
        for steps in (1, 2):
            words = self.words("tuned", steps, *more)
            fit(finetune_config(None, words, world_size=self.ranks))

    def convert(self) -> None:
        """Teach a dense student, upcycle it and train that on, in two legs."""
        more = [f"distill.teacher={self.folder}/switch"]
        if self.pipeline:  # whose teacher has run before, on one stage
            more.append(f"distill.logits={self.folder}/kept")
            words = [w for w in self.words("student", 3, *self.small, *more) if ".pp=" not in w]
            cached = load_config(None, words, world_size=self.ranks)
            cache_logits(cached, joined(cached))
        for steps in (2, 3):
            self.run("student", steps, *more)
        mesh = joined(RunConfig())
        with mesh.together():
            if mesh.rank == 0:
                moe = MoEConfig(num_experts=4, group_size=128)
                upcycle(self.folder / "student", self.folder / "upcycled", Recipe(moe))
        for steps in (1, 2):
            start = f"train.init_from={self.folder}/upcycled"
            self.run(
                "continued", steps, "model.moe.num_experts=4", "model.moe.group_size=128", start
            )

    def use(self) -> dict[str, float | str]:
        """Evaluate, prune, evaluate and score what is left, and let it write."""
        found: dict[str, float | str] = {}
        usage = self.evaluate("switch", found)
        mesh = joined(RunConfig())
        with mesh.together():
            if mesh.rank == 0:
                (self.folder / "usage.json").write_text(json.dumps(usage))
                source, target = self.folder / "switch", self.folder / "pruned"
                prune(source, target, self.folder / "usage.json", 2, merge=True)
        self.evaluate("pruned", found)
        request = TaskRequest(
            checkpoint=self.folder / "tuned", samples=6, batch_size=4,
            tasks=[f"lang={self.tasks}/lang_valid.jsonl"], **self.spread,
        )  # fmt: skip
        plan = request.plan(self.ranks)
        for result in evaluate_tasks(plan, joined(plan.config)):
            found |= {f"tuned {key}": value for key, value in result.figures.items()}
        self.generate("pruned", found)
        return found

    def evaluate(self, name: str, found: dict[str, float | str]) -> dict:
        request = Request(
            checkpoint=self.folder / name, data=[f"{self.text}/valid"], samples=8, **self.spread
        )
        plan = request.plan(self.ranks)
        evaluation = evaluate(plan, joined(plan.config))
        found[f"{name} loss"] = evaluation.total.metrics["loss"]
        return _as_json(evaluation)

    def generate(self, name: str, found: dict[str, float | str]) -> None:
        path = self.folder / name
        pieces = checkpoint_tokenizer(path, None)
        request = Request(checkpoint=path, data=[], **self.spread)
        plan = request.plan(self.ranks)
        mesh = joined(plan.config)
        model = load_trained(plan.checkpoint, plan.config, mesh)[0].models[0]
        writer = TextGenerator(model, pieces, Decoding(max_tokens=4), torch.float64)
        prompts = ["ba <extra_id_0> du", "le", "ma <extra_id_0>"]
        for number, answer in enumerate(_completions(writer, prompts, 2, mesh)):
            found |= {f"text {number}": answer.output, f"score {number}": answer.score}


def piece(method: str, *arguments) -> dict[str, float | str] | None:
    """A part of the workflows, in fp64; runs in the processes of a `World`."""
    with working_in(torch.float64):
        return getattr(Workflows(*arguments), method)()


def everything(world, *arguments) -> dict[str, float | str]:
    """What one model under one layout came to, the losses of all steps among it."""
    folder, ranks = arguments[2], LAYOUTS[arguments[3]][0]
    for method in ("train", "convert"):
        world.run(ranks, piece, method, *arguments)
    found, *others = world.run(ranks, piece, "use", *arguments)
    assert all(other == found for other in others)
    for run, steps in (("switch", 3), ("tuned", 2), ("student", 3), ("continued", 2)):
        metrics = read_metrics(folder / run / "metrics.jsonl")
        assert [m["step"] for m in metrics if "loss" in m] == list(range(1, steps + 1))
        for m in metrics:
            wanted = ("loss", "valid/loss", "soft_loss", "grad_norm")
            found |= {f"{run} {m['step']} {key}": m[key] for key in wanted if key in m}
    return found


@pytest.fixture(scope="module")
def alone(world, text_run, tasks, tmp_path_factory):  # noqa: F811
    """What one process came to, by model."""
    known = {}

    def find(model):
        if model not in known:
            folder = tmp_path_factory.mktemp("alone")
            known[model] = everything(world, text_run, tasks, folder, "alone", model)
        return known[model]

    return find


def check(world, alone, text_run, tasks, folder, layout, model):  # noqa: F811
    expected = alone(model)
    assert sum(key.startswith(("student", "continued")) for key in expected) > 10
    assert all(math.isfinite(v) for v in expected.values() if isinstance(v, float))
    found = everything(world, text_run, tasks, folder, layout, model)
    # Of a teacher in a pipeline only the likeliest tokens are kept.
    taught = ("student", "continued") if layout == "pp2" else ()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if not key.startswith(taught):
            wanted = pytest.approx(value, rel=BOUND) if isinstance(value, float) else value
            assert found[key] == wanted, key


def test_all_workflows_under_expert_parallelism(world, alone, text_run, tasks, tmp_path):  # noqa: F811
    check(world, alone, text_run, tasks, tmp_path, "ep2", "top-2")


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_all_workflows(world, alone, text_run, tasks, tmp_path, layout, model):  # noqa: F811
    check(world, alone, text_run, tasks, tmp_path, layout, model)


def test_every_router_takes_part():
    routers = {word.partition("=")[2] for words in MODELS.values() for word in words[:1]}
    assert set(ROUTERS) <= routers
