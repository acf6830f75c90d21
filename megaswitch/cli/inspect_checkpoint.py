"""`megaswitch inspect` of a checkpoint."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from megaswitch.checkpoint.contents import MODEL, STATE
from megaswitch.checkpoint.integrity import check_sizes, recorded_sum
from megaswitch.checkpoint.manager import FORMAT, read_config, read_state, verify
from megaswitch.checkpoint.tensor_files import StoredTensor, read_headers
from megaswitch.cli.changes import changes
from megaswitch.cli.parameter_tree import parameter_tree
from megaswitch.cli.show import print_fields, print_lines, print_table, size, sparkline
from megaswitch.cli.tensor_stats import Stats, merged, spread, tensor_stats
from megaswitch.config import RunConfig
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.log import UserError
from megaswitch.model.count import count, meta_model
from megaswitch.model.switch_transformer import SwitchTransformer
from megaswitch.parallel.shard import spec_of

# The optimizer's state of a stack of experts that follows the mean square of their gradients.
_SQUARES = ("row", "moment", "exp_avg_sq")


def checkpoint_report(path: Path, *, check_sums: bool, with_stats: bool) -> dict[str, Any]:
    """Everything that the headers and small files of a checkpoint say.

    Args:
        path: the checkpoint's folder.
        check_sums: compare every file with its checksum.
        with_stats: read every tensor and describe its values.

    Raises:
        UserError: it is incomplete, damaged, of another format, or not of its configuration.
    """
    state = read_state(path)
    check_sizes(path, state["files"])
    if check_sums:
        verify(path)
    config = read_config(path)
    layout = changes(config, "parallel.")
    tensors = read_headers([path / n for n in sorted(state["files"]) if n.endswith(".safetensors")])
    model = meta_model(config.model)
    _check_model(path, model, tensors)
    sizes = asdict(count(config.model))
    report = {
        "kind": "checkpoint",
        "path": str(path),
        "format": FORMAT,
        **state["state"],
        "layout": {c["key"].removeprefix("parallel."): c["value"] for c in layout},
        "model": {
            "preset": config.model.preset,
            "changes": changes(config, "model."),
            "switch_layers": config.model.switch_layers(),
            "num_experts": config.model.moe.num_experts,
            "total_parameters": sizes["total_parameters"],
            "active_parameters": sizes["active_parameters"],
        },
        "parameters": _parameters(model, tensors),
        "optimizer": _optimizer(config, tensors),
        "files": state["files"],
        "verified": check_sums,
        "tokenizer": _tokenizer(path / "tokenizer.model"),
    }
    return report | ({"stats": _stats(model, tensors)} if with_stats else {})


def _check_model(path: Path, model: SwitchTransformer, tensors: dict[str, StoredTensor]) -> None:
    wanted = {f"{MODEL}{name}": tuple(p.shape) for name, p in model.named_parameters()}
    held = {name: t.shape for name, t in tensors.items() if name.startswith(MODEL)}
    wrong = [f"{name} is missing" for name in wanted if name not in held]
    wrong += [f"{name} is not of its model" for name in held if name not in wanted]
    wrong += [
        f"{name} has shape {list(held[name])} and must have {list(shape)}"
        for name, shape in wanted.items()
        if name in held and held[name] != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(
            f"the tensors of checkpoint {path} are not those of its config.toml: "
            f"{'; '.join(wrong[:5])}{more}. Its files do not belong together; use another one"
        )


def _parameters(model: SwitchTransformer, tensors: dict[str, StoredTensor]) -> list[dict[str, Any]]:
    stored = ((name, tensors[f"{MODEL}{name}"]) for name, _ in model.named_parameters())
    return [
        {
            "name": name,
            "shape": list(t.shape),
            "dtype": t.dtype,
            "count": t.count,
            "bytes": t.bytes,
            "parts": [len({part.offsets[d] for part in t.parts}) for d in range(len(t.shape))],
        }
        for name, t in stored
    ]


def _optimizer(config: RunConfig, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    by_kind: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if name.startswith(STATE):
            by_kind[name.rpartition(".")[2]] += tensor.bytes
    return {"name": config.optim.name, "bytes": sum(by_kind.values()), "by_kind": dict(by_kind)}


def _tokenizer(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return asdict(Tokenizer(path).info)


def _stats(model: SwitchTransformer, tensors: dict[str, StoredTensor]) -> dict[str, Any]:
    """Of the parameters by name, of the optimizer's state by kind, and of experts one by one."""
    parameters: dict[str, Stats] = {}
    kinds: dict[str, Stats] = defaultdict(Stats)
    experts = []
    for name, parameter in model.named_parameters():
        stack = spec_of(parameter).is_expert
        found = tensor_stats(tensors[f"{MODEL}{name}"], by_expert=stack)
        parameters[name] = merged(found)
        if stack:
            experts.append(spread(name, "rms of weights", [s.rms for s in found]))
        prefix = f"{STATE}{name}."
        for key in (key for key in tensors if key.startswith(prefix)):
            kind, tensor = key.removeprefix(prefix), tensors[key]
            by_expert = stack and kind in _SQUARES
            found = tensor_stats(tensor, by_expert=by_expert)
            kinds[kind].merge(merged(found))
            if by_expert:
                roots = [math.sqrt(max(s.mean, 0.0)) if s.finite else math.nan for s in found]
                experts.append(spread(name, "rms of gradients", roots))
    return {
        "parameters": {name: stats.report() for name, stats in parameters.items()},
        "optimizer": {kind: stats.report() for kind, stats in kinds.items()},
        "experts": experts,
    }


def print_checkpoint(report: dict[str, Any]) -> None:
    """Show a report of `checkpoint_report` to people."""
    model, optimizer = report["model"], report["optimizer"]
    print_fields(
        f"Checkpoint {report['path']}",
        [
            ("step", f"{report['step']:,}"),
            ("samples seen", f"{report['samples']:,}"),
            ("data fingerprint", report["fingerprint"]),
            ("model", f"{model['preset'] or 'no preset'}, {_experts(model)}"),
            *((f"  {c['key']}", f"{c['value']!r} (preset: {c['usual']!r})")
              for c in model["changes"]),
            ("layout", ", ".join(f"{k} {v}" for k, v in report["layout"].items()) or "one rank, or "
                                                                              "data-parallel"),
            ("parameters", f"{model['total_parameters']:,}, "
                           f"{model['active_parameters']:,} active for a token"),
            ("optimizer", f"{optimizer['name']}, {size(optimizer['bytes'])} of state ("
                          + ", ".join(f"{k} {size(b)}" for k, b in optimizer["by_kind"].items())
                          + ")"),
            ("tokenizer", _describe_tokenizer(report["tokenizer"])),
        ],
    )  # fmt: skip
    _print_parameters(report)
    if "stats" in report:
        _print_stats(report["stats"])
    table = Table("file", "size", "checksum", box=None)
    for name, entry in report["files"].items():
        mark = " ✓" if report["verified"] else ""
        table.add_row(name, size(entry["bytes"]), f"{' '.join(recorded_sum(entry))[:23]}…{mark}")
    total = sum(entry["bytes"] for entry in report["files"].values())
    hint = "all sums match" if report["verified"] else "--verify checks the sums"
    print_table(f"Files: {size(total)}; {hint}", table)


def _experts(model: dict[str, Any]) -> str:
    layers = len(model["switch_layers"])
    return f"{layers} Switch layers of {model['num_experts']} experts" if layers else "dense"


def _describe_tokenizer(tokenizer: dict[str, Any] | None) -> str:
    if tokenizer is None:
        return "none (set data.tokenizer, and checkpoints take it along)"
    return (
        f"tokenizer.model, {tokenizer['vocab_size']:,} ids, {tokenizer['num_extra_ids']} of them "
        f"sentinels, sha256 {tokenizer['tokenizer_sha256'][:16]}…"
    )


def _print_parameters(report: dict[str, Any]) -> None:
    tensors = {
        p["name"]: StoredTensor(p["name"], tuple(p["shape"]), p["dtype"])
        for p in report["parameters"]
    }
    stats = report.get("stats", {}).get("parameters")
    titles = ("min", "max", "mean", "rms", "NaN/Inf") if stats else ()
    parts = {p["name"]: p["parts"] for p in report["parameters"]}
    table = Table(
        "parameter", "shape", "in parts", "type", "each", "all", "size", *titles, box=None
    )
    for line in parameter_tree(tensors):
        first, total = line.tensors[0], sum(t.count for t in line.tensors)
        cells = ["", "", "", ""]
        if line.leaf:
            several = f"{first.count:,} × {len(line.tensors)}"
            cells = [
                "×".join(map(str, first.shape)),
                "×".join(map(str, parts[first.name]))
                if max(parts[first.name], default=1) > 1
                else "–",
                first.dtype,
                several if len(line.tensors) > 1 else "",
            ]
        cells += [f"{total:,}", size(sum(t.bytes for t in line.tensors))]
        if stats and line.leaf:
            cells += _together([stats[t.name] for t in line.tensors])
        table.add_row(line.label, *cells)
    everything = sum(t.bytes for t in tensors.values())
    print_table(f"Parameters: {len(tensors)} tensors, {size(everything)}", table)


def _together(parts: list[dict[str, float]]) -> list[str]:
    """Cells of the statistics of tensors that share a line; they are equally large."""
    mean = math.fsum(p["mean"] for p in parts) / len(parts)
    rms = math.sqrt(math.fsum(p["rms"] ** 2 for p in parts) / len(parts))
    bad = sum(int(p["nan"]) for p in parts), sum(int(p["inf"]) for p in parts)
    numbers = (min(p["min"] for p in parts), max(p["max"] for p in parts), mean, rms)
    return [*(f"{n:.3g}" for n in numbers), f"{bad[0]}/{bad[1]}" if any(bad) else "–"]


def _print_stats(stats: dict[str, Any]) -> None:
    broken = [
        f"{name}: {s['nan']:,} NaN, {s['inf']:,} infinite"
        for name, s in (stats["parameters"] | stats["optimizer"]).items()
        if s["nan"] or s["inf"]
    ]
    if broken:
        print_lines("NOT FINITE", broken)
    if not stats["experts"]:
        return
    titles = ("min", "median", "max", "by expert", "stand out")
    table = Table("experts of", "what", *titles, box=None)
    for entry in stats["experts"]:
        apart = entry["stand_out"]
        shown = ", ".join(map(str, apart[:8])) + (f", … ({len(apart)})" if len(apart) > 8 else "")
        numbers = (f"{entry[key]:.3g}" for key in ("min", "median", "max"))
        table.add_row(
            entry["parameter"], entry["what"], *numbers, sparkline(entry["values"]), shown or "–"
        )
    print_table(
        "Experts: one that stands out is 4 times above or below the median; gradients near 0 mean "
        "that no token reaches it",
        table,
        right_from=2,
    )
