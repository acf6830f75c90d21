"""From the plans of a scaling study to its tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
PARTS = ("compute", "imbalance", "tensor_parallel", "expert_parallel", "data_parallel", "bubble",
         "optimizer", "checkpoint")  # fmt: skip


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def layout(row: Row) -> str:
    """Such as "pp 2 · ep 64 · zero full"."""
    edp = row["world"] // (row["pp"] * row["ep"] * row["tp"])
    sizes = {"pp": row["pp"], "edp": edp, "ep": row["ep"], "tp": row["tp"]}
    words = [f"{axis} {size}" for axis, size in sizes.items() if size > 1]
    words += [f"ZeRO {row['zero']}"] * (row["zero"] != "none")
    return " · ".join(words + ["recompute"] * row["recompute"]) or "one GPU"


def scaling(points: Sequence[Row]) -> str:
    """One model's curve."""
    head = ("GPUs", "layout", "GB", "step, s", "tokens/s", "MFU", "efficiency", "most time: share",
            "second")  # fmt: skip
    return markdown(head, [_point(p) for p in points])


def _point(p: Row) -> Sequence[str]:
    if "stops" in p:
        return [f"{p['world']:,}", p["stops"], *["–"] * 7]
    return [
        f"{p['world']:,}",
        layout(p),
        f"{p['memory'] / 1e9:.0f}",
        f"{p['step']:.3g}",
        f"{p['tokens_per_second']:,.0f}",
        f"{p['mfu']:.1%}",
        f"{p['efficiency']:.0%}",
        *most(p),
    ]


def most(row: Row) -> list[str]:
    """The two largest parts of a step."""
    parts = sorted(row["seconds"].items(), key=lambda part: -part[1])[:2]
    return [f"{name.replace('_', ' ')}: {took / row['step']:.0%}" for name, took in parts]


def layouts(rows: Sequence[Row]) -> str:
    """Layouts of one model, beside each other."""
    head = ("layout", "GB", "step, s", "tokens/s", "expert parallel, s", "tensor parallel, s",
            "data parallel, s")  # fmt: skip
    return markdown(
        head,
        [
            [
                layout(r),
                f"{r['memory'] / 1e9:.0f}",
                f"{r['step']:.3g}",
                f"{r['tokens_per_second']:,.0f}",
                *(
                    f"{r['seconds'][f'{axis}_parallel']:.3g}"
                    for axis in ("expert", "tensor", "data")
                ),
            ]
            for r in rows
        ],
    )


def imbalance(rows: Sequence[Row]) -> str:
    """One layout, with more and more uneven experts."""
    head = ("routing", "busiest rank", "dropped", "waiting, s", "step, s", "tokens/s")
    return markdown(
        head,
        [
            [
                r["skew"],
                f"×{r['busiest']:.2f}",
                f"{r['dropped']:.1%}",
                f"{r['seconds']['imbalance']:.3g}",
                f"{r['step']:.3g}",
                f"{r['tokens_per_second']:,.0f}",
            ]
            for r in rows
        ],
    )


def checkpoints(weak: Mapping[str, Sequence[Row]]) -> str:
    """Of the largest world of each model."""
    rows = []
    for model, points in weak.items():
        fitting = [p for p in points if "checkpoint" in p]
        if not fitting:
            continue
        for p in (fitting[0], fitting[-1]):
            saved = p["checkpoint"]
            size = f"{saved['size'] / 1e9:,.1f}"
            times = f"{saved['copy']:.2g}", f"{saved['write']:.2g}"
            rows.append([model, f"{p['world']:,}", size, *times])
    head = ("model", "GPUs", "GB in all", "copy to hosts, s", "write, s")
    return markdown(head, rows)


def paper(rows: Sequence[Row]) -> str:
    """Switch-C as the paper divides it."""
    head = ("", "parameters", "GB", "step, s", "tokens/s", "MFU", "most time: share", "second")
    return markdown(
        head,
        [
            [
                r["name"],
                f"{r['parameters']:,}",
                f"{r['memory'] / 1e9:.0f}",
                f"{r['step']:.3g}",
                f"{r['tokens_per_second']:,.0f}",
                f"{r['mfu']:.1%}",
                *most(r),
            ]
            for r in rows
        ],
    )


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """All tables, by title."""
    found = {}
    for kind in ("weak", "strong"):
        for model, points in results[kind].items():
            found[f"{kind.capitalize()} scaling: {model}"] = scaling(points)
    for model, kinds in results["layouts"].items():
        for kind, rows in kinds.items():
            found[f"Layouts by {kind}: {model}, {rows[0]['world']:,} GPUs"] = layouts(rows)
    for model, rows in results["imbalance"].items():
        found[f"Imbalance: {model}, {layout(rows[0])}"] = imbalance(rows)
    found["Checkpoints"] = checkpoints(results["weak"])
    found["The paper's layout: switch-c-2048, ep 2,048"] = paper(results["paper"])
    return found


def write(results: Mapping[str, Any], folder: Path) -> None:
    """`tables.md` and a picture for each kind of scaling."""
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in tables(results).items())
    (folder / "tables.md").write_text(text + "\n", encoding="utf-8")
    for kind in ("weak", "strong"):
        draw(results[kind], folder / f"{kind}.png", f"{kind} scaling, {results['hardware']}")


def draw(models: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Tokens per second over GPUs, and where the time of each point goes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    top, *below = figure.subplot_mosaic(
        [["speed"] * 4, list("abcd")], height_ratios=[3, 2]
    ).values()
    for model, points in models.items():
        known = [p for p in points if "seconds" in p]
        worlds = [p["world"] for p in known]
        (line,) = top.plot(worlds, [p["tokens_per_second"] for p in known], "o-", label=model)
        if known:
            first = known[0]["tokens_per_second"] / worlds[0]
            top.plot(worlds, [first * w for w in worlds], ":", color=line.get_color(), lw=0.8)
    top.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s", title=title)
    top.set_xscale("log", base=2)
    top.xaxis.set_major_formatter("{x:g}")
    top.legend(frameon=False)
    for axis, (model, points) in zip(below, models.items(), strict=True):
        known = [p for p in points if "seconds" in p]
        base = [0.0] * len(known)
        for number, part in enumerate(PARTS):
            shares = [p["seconds"][part] / p["step"] for p in known]
            names = [str(p["world"]) for p in known]
            axis.bar(names, shares, bottom=base, color=f"C{number}", label=part.replace("_", " "))
            base = [a + b for a, b in zip(base, shares, strict=True)]
        axis.set_title(model, fontsize="small")
        axis.tick_params(labelsize="x-small")
    handles, names = below[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
