"""How Switch Transformers scale from 8 to 4,096 GPUs, on paper: plans of `megaswitch plan`.

No GPU and no run is needed; it is arithmetic on rehearsed blocks and a datasheet, some five minutes
of one core. Command: python examples/studies/scaling/run.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from tables import write

from megaswitch.model.count import count
from megaswitch.rules import check
from megaswitch.scale.estimate import Estimate, estimate
from megaswitch.scale.hardware import Hardware, load_hardware
from megaswitch.scale.plan import Plan, preset_run, search
from megaswitch.scale.planned import planned_toml
from megaswitch.scale.profiles import Profiles, profiles_of
from megaswitch.scale.routing import simulate_routing
from megaswitch.train.placement import row_lengths

MODELS = ("switch-base-128", "switch-large-128", "switch-xxl-128", "switch-c-2048")
WORLDS = (8, 32, 128, 512, 1024, 2048, 4096)
ROWS = 16  # sequences of 512 tokens for each GPU: weak scaling
BATCH = 2048  # sequences of a step, the paper's 2^20 tokens: strong scaling
# Where layouts of one model are compared: ranks, sequences of a step.
COMPARED = {"switch-base-128": (64, 2048), "switch-xxl-128": (1024, 8192)}
# Runs whose configurations are written: ranks of the weak scaling.
PLANNED = {
    "switch-base-128": 32,
    "switch-large-128": 128,
    "switch-xxl-128": 1024,
    "switch-c-2048": 2048,
}
SKEWS = ("uniform", "zipf:0.2", "zipf:0.4", "zipf:0.8")
# The paper's own layout of Switch-C, expert and data parallelism alone: overrides by what they are.
PAPER = {
    "routing groups of 2,048 tokens, 2^22 a step": (
        "--train.batch_size=8192", "--train.micro_batch_size=4"),
    "routing groups of 512 tokens, 2^20 a step": (
        "--train.batch_size=2048", "--train.micro_batch_size=1", "--model.moe.group_size=512"),
}  # fmt: skip


class Study:
    """Plans on one machine, with the profiles of each model made once."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.profiles: Callable[[str], Profiles] = cache(
            lambda model: profiles_of(preset_run(model), hardware)
        )
        self.plan = cache(self._plan)

    def _plan(self, model: str, world: int, batch: int, keep: int = 1) -> Plan:
        """Of the preset with so many sequences a step."""
        print(f"{model}, {world} GPUs, {batch} sequences", flush=True)
        config = preset_run(model, [f"--train.batch_size={batch}", "--checkpoint.interval=500"])
        return search(config, world, self.hardware, keep=keep, profiles=self.profiles(model))

    def scaling(self, worlds: Iterable[int], *, weak: bool) -> dict[str, list[dict[str, Any]]]:
        """The best layout of each model and world."""
        found = {}
        for model in MODELS:
            points = [
                point_of(self.plan(model, world, world * ROWS if weak else BATCH))
                for world in worlds
            ]
            for point in points:
                first = next(p for p in points if "seconds" in p) if "seconds" in point else None
                if first:
                    by_gpu = (p["tokens_per_second"] / p["world"] for p in (point, first))
                    point["efficiency"] = next(by_gpu) / next(by_gpu)
            found[model] = points
        return found

    def layouts(self, model: str, world: int, batch: int) -> dict[str, list[dict[str, Any]]]:
        """The best layout for each number of expert-parallel ranks, and for each with tp."""
        every = [row_of(one) for one in self.plan(model, world, batch, 1_000_000).best]
        best: dict[str, dict[tuple[int, ...], dict[str, Any]]] = {"ep": {}, "tp and ep": {}}
        for row in every:  # the fastest come first
            best["ep"].setdefault((row["ep"],), row)
            if row["pp"] == 1:
                best["tp and ep"].setdefault((row["tp"], row["ep"]), row)
        return {kind: [rows[key] for key in sorted(rows)] for kind, rows in best.items()}

    def imbalance(self, model: str, world: int, batch: int) -> list[dict[str, Any]]:
        """The best layout again, with experts that are not equally popular."""
        best = self.plan(model, world, batch).best[0]
        return [self._skewed(model, best, skew) for skew in SKEWS]

    def _skewed(self, model: str, best: Estimate, skew: str) -> dict[str, Any]:
        config, lengths = best.config, row_lengths(best.config)
        loads = simulate_routing(config, skew, lengths, most_layers=2)
        busiest = {stack: load.busiest_rank for stack, load in loads.items()}
        profiles = self.profiles(model)
        one = estimate(config, best.world, lengths, profiles, self.hardware, busiest)
        drops = {"dropped": max(load.dropped for load in loads.values())}
        return row_of(one) | drops | {"skew": skew, "busiest": max(busiest.values())}

    def planned(self) -> dict[str, str]:
        """Configurations of runs, by file name."""
        found = {}
        for model, world in PLANNED.items():
            best = self.plan(model, world, world * ROWS).best[0]
            found[f"{model}.toml"] = planned_toml(best, self.hardware)
        return found

    def paper(self) -> list[dict[str, Any]]:
        """Switch-C with an expert of each layer on each of 2,048 ranks, and nothing else divided.

        The layouts are checked as for a run.
        """
        return [self._paper(name, words) for name, words in PAPER.items()]

    def _paper(self, name: str, words: tuple[str, ...]) -> dict[str, Any]:
        world = 2048
        config = preset_run("switch-c-2048", words)
        config = replace(config, parallel=replace(config.parallel, ep=world))
        problems = check(config, world)
        assert not problems, problems
        one = estimate(
            config, world, row_lengths(config), profiles_of(config, self.hardware), self.hardware
        )
        return row_of(one) | {"name": name, "parameters": count(config.model).total_parameters}


def point_of(plan: Plan) -> dict[str, Any]:
    """A point of a curve; what stops it, where nothing fits."""
    if plan.best:
        return row_of(plan.best[0])
    if plan.smallest:
        need = plan.smallest.memory.total
        return {"world": plan.world, "stops": f"memory: needs {need / 1e9:,.0f} GB"}
    return {"world": plan.world, "stops": "batch: too few routing groups"}


def row_of(one: Estimate) -> dict[str, Any]:
    """What the tables show of a plan. Bytes and seconds, rounded to what can be read."""
    parallel, train = one.config.parallel, one.config.train
    seconds = {name: float(f"{took:.4g}") for name, took in vars(one.seconds).items()}
    return {
        "world": one.world,
        "batch": train.batch_size,
        "pp": parallel.pp,
        "ep": parallel.ep,
        "tp": parallel.tp,
        "zero": parallel.zero,
        "micro_batch_size": train.micro_batch_size,
        "recompute": train.activation_checkpointing,
        "memory": float(f"{one.memory.total:.4g}"),
        "seconds": seconds,
        "step": float(f"{one.seconds.total:.4g}"),
        "bottleneck": max(seconds, key=lambda name: seconds[name]),
        "tokens_per_second": float(f"{one.tokens_per_second:.4g}"),
        "mfu": float(f"{one.mfu:.4g}"),
        "checkpoint": {n: float(f"{v:.4g}") for n, v in vars(one.checkpoint).items()},
    }


def main() -> None:
    """Plan everything, and write tables, pictures and configurations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hardware", default="h100", help="as of megaswitch plan")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    arguments = parser.parse_args()
    study = Study(load_hardware(arguments.hardware))
    results = {
        "hardware": study.hardware.name,
        "weak": study.scaling(WORLDS, weak=True),
        "strong": study.scaling(WORLDS, weak=False),
        "layouts": {m: study.layouts(m, *sizes) for m, sizes in COMPARED.items()},
        "imbalance": {m: study.imbalance(m, *sizes) for m, sizes in COMPARED.items()},
        "paper": study.paper(),
    }
    folder = arguments.output
    (folder / "planned").mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    for name, text in study.planned().items():
        (folder / "planned" / name).write_text(text, encoding="utf-8")
    write(results, folder)


if __name__ == "__main__":
    main()
