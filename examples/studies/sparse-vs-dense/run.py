"""Is a Switch model better than a dense one of equal FLOPs per token? Train both and compare.

The same command again reads the runs that are finished and does the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import curve, draw, summarize, table

from megaswitch.metrics_file import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SWEEP = (0.03, 0.06, 0.12)


@dataclass(frozen=True)
class Model:
    """A competitor: what it adds to study.toml, its best rate of the sweep, its seeds."""

    name: str
    overrides: tuple[str, ...]
    rate: float = 0.06
    seeds: tuple[int, ...] = (1, 2, 3)
    sparse: bool = False


def switch(num_experts: int, **other: Any) -> Model:
    """The dense model with experts in every second layer; a batch is one routing group."""
    experts = ("--model.preset=switch-tiny", f"--model.moe.num_experts={num_experts}")
    return Model(f"{num_experts} experts", experts, sparse=True, **other)


@dataclass(frozen=True)
class Task:
    """What is to be learned from the text, and who competes.

    `group_size` makes a batch of 32 rows one routing group; `suffix` ends the names of files.
    """

    suffix: str
    overrides: tuple[str, ...]
    group_size: int
    models: tuple[Model, ...]


DENSE = Model("dense", ())
# Only gives a direction: about the parameters of 8 experts, all used by every token.
WIDE = Model("wide dense", ("--model.d_ff=1024",), seeds=(1,))
T5_SPANS = Task("", (), 4096, (DENSE, switch(8), switch(32), WIDE))
# Half of the text is hidden, so a step of about the same cost has nearly three times the targets.
HALF = ("--data.noise_density=0.5", "--data.mean_span_length=16", "--data.encoder_length=80")
LONG_SPANS = Task("-long-spans", HALF, 2560, (DENSE, switch(8)))


@dataclass(frozen=True)
class Study:
    """A corpus, the folder of its tokens and runs, the length of a run, and its task."""

    corpus: Path
    folder: Path
    steps: int
    task: Task

    def prepare(self) -> None:
        """Train the tokenizer and make the token files, if that is not done."""
        tokenizer, tokens = self.folder / "spm.model", self.folder / "tokens"
        if not tokenizer.is_file():
            output = ("--output", str(tokenizer), "--vocab-size", "2048")
            megaswitch("tokenizer", "train", str(self.corpus), *output)
        if not all(Path(f"{tokens}_{part}.idx").is_file() for part in ("train", "valid")):
            output = ("--output", str(tokens), "--valid-fraction", "0.05")
            megaswitch("preprocess", str(self.corpus), "--tokenizer", str(tokenizer), *output)

    def run_dir(self, model: Model, rate: float, seed: int) -> Path:
        """Where a run is kept."""
        name = f"{model.name}-rate{rate}-seed{seed}-steps{self.steps}{self.task.suffix}"
        return self.folder / name.replace(" ", "-")

    def overrides(self, model: Model, rate: float, seed: int) -> list[str]:
        """What a run changes in study.toml."""
        settings = {
            "data.train": self.folder / "tokens_train",
            "data.valid": self.folder / "tokens_valid",
            "optim.learning_rate": rate,
            "optim.decay_steps": self.steps // 3,
            "train.run_dir": self.run_dir(model, rate, seed),
            "train.steps": self.steps,
            "train.seed": seed,
        }
        if model.sparse:
            settings["model.moe.group_size"] = self.task.group_size
        words = (f"--{key}={value}" for key, value in settings.items())
        return [*model.overrides, *self.task.overrides, *words]

    def train(self, model: Model, rate: float, seed: int) -> list[dict[str, Any]]:
        """The metrics of one run, which is trained first if it is not finished."""
        path = self.run_dir(model, rate, seed) / "metrics.jsonl"
        if not any(m["step"] == self.steps and "valid/loss" in m for m in read_metrics(path)):
            megaswitch("train", str(HERE / "study.toml"), *self.overrides(model, rate, seed))
        return read_metrics(path)


def megaswitch(*words: str) -> None:
    """Show a command of MegaSwitch and run it in one thread; its failure ends the study."""
    print("$ megaswitch", *words, flush=True)
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    subprocess.run([sys.executable, "-m", "megaswitch", *words], check=True, env=environment)


def sweep(study: Study) -> None:
    """Print the held-out loss at each learning rate, with a seed not used elsewhere."""
    models = [model for model in study.task.models if len(model.seeds) > 1]
    losses = {
        model.name: [curve(study.train(model, rate, seed=0), "valid/loss")[-1][1] for rate in SWEEP]
        for model in models
    }
    print("\nheld-out loss at learning rates", *SWEEP)
    for name, values in losses.items():
        print(f"{name}:", *(f"{value:.3f}" for value in values))


def compare(study: Study) -> None:
    """Train each model with its seeds; write the results and the curves, print the table."""
    runs = {m: {seed: study.train(m, m.rate, seed) for seed in m.seeds} for m in study.task.models}
    results = {
        m.name: {"rate": m.rate, "seeds": m.seeds}
        | summarize(list(of_seed.values()), [runs[DENSE][seed] for seed in of_seed])
        for m, of_seed in runs.items()
    }
    record = {"corpus": study.corpus.name, "steps": study.steps, "models": results}
    names = (f"results{study.task.suffix}.json", f"curves{study.task.suffix}.png")
    path, picture = (study.folder / name for name in names)
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    draw(results, picture)
    print(f"\n{table(results)}\n\n{path}\n{picture}")


def main() -> None:
    """Read the options and run the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    books = ROOT / "examples/data/classics.jsonl.zst"
    runs = ROOT / "runs/sparse-vs-dense"
    parser.add_argument("--corpus", type=Path, default=books, help="text, as for preprocess")
    parser.add_argument("--runs", type=Path, default=runs, help="folder of tokens and runs")
    parser.add_argument("--steps", type=int, default=1000, help="of each run")
    parser.add_argument("--sweep", action="store_true", help="compare learning rates instead")
    parser.add_argument("--long-spans", action="store_true", help="hide half, in spans of 16")
    options = parser.parse_args()
    folder = options.runs / options.corpus.name.split(".")[0]
    folder.mkdir(parents=True, exist_ok=True)
    task = LONG_SPANS if options.long_spans else T5_SPANS
    study = Study(options.corpus, folder, options.steps, task)
    study.prepare()
    if options.sweep:
        sweep(study)
    else:
        compare(study)


if __name__ == "__main__":
    main()
