"""A study's report with pictures: PNG files, and one HTML page that holds everything.

matplotlib is the extra `plot`, imported where it is used.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from megaswitch.log import UserError
from megaswitch.scale.curves import Spread, mean_curve
from megaswitch.scale.report import Report, as_json, markdown, table, told

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }}
.note {{ color: #a33; }}
</style></head><body>
<h1>{title}</h1>
<p>{question}</p>
{table}
<p>Mean ± standard deviation over the runs of a row.</p>
{fits}
{notes}
{pictures}
<details><summary>The runs</summary><pre>{runs}</pre></details>
<details><summary>Numbers</summary><pre>{numbers}</pre></details>
</body></html>
"""


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `report.md`, `report.json`, the pictures and `index.html`; their paths.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401, ICN001
    except ImportError as error:
        raise UserError(
            f"the pictures of a report need matplotlib, which cannot be imported ({error}); "
            "install it with pip install 'megaswitch[plot]', or print the table alone with --json"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"curves.png": draw_curves(report)}
    if report.fits:
        pictures["fit.png"] = draw_fits(report)
    numbers = json.dumps(as_json(report), indent=1)
    texts = {
        "report.md": markdown(report),
        "report.json": numbers + "\n",
        "index.html": page(report, pictures, numbers),
    }
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in (*texts, *pictures)]


def page(report: Report, pictures: dict[str, bytes], numbers: str) -> str:
    """The page, whatever the names in it."""
    head, *body = table(report)
    rows = "".join(
        f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
        for tag, row in [("th", head), *(("td", row) for row in body)]
    )
    shown = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        for name, data in pictures.items()
    )
    jobs = [f"{job.name}\n    {' '.join(job.overrides)}" for job in report.study.jobs]
    return _PAGE.format(
        title=html.escape(report.study.file.title),
        question=html.escape(report.study.file.question),
        table=f"<table>{rows}</table>",
        fits="".join(f"<p>{html.escape(told(fit, report))}</p>" for fit in report.fits),
        notes="".join(f'<p class="note">{html.escape(note)}</p>' for note in report.notes),
        pictures=shown,
        runs=html.escape("\n".join(jobs)),
        numbers=html.escape(numbers),
    )


def draw_curves(report: Report) -> bytes:
    """The first measure over steps, a line and the seeds' deviation for each row."""
    figure, axis = _figure()
    for row in report.rows:
        if not row.curves:
            continue
        points = mean_curve(row.curves)
        steps = [step for step, _ in points]
        means = [spread.mean for _, spread in points]
        (line,) = axis.plot(steps, means, marker="o", ms=3, label=_plain(row.name))
        off = [spread.deviation or 0.0 for _, spread in points]
        low, high = ([m + sign * o for m, o in zip(means, off, strict=True)] for sign in (-1, 1))
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
    axis.set(xlabel="step", ylabel=report.measure)
    axis.legend(frameon=False, fontsize="small")
    return _png(figure)


def draw_fits(report: Report) -> bytes:
    """Points, mean and deviation, and the fitted lines, in logarithms."""
    figure, axis = _figure()
    for fit in report.fits:
        xs = sorted(set(fit.x))
        spreads = [
            Spread.of([y for at, y in zip(fit.x, fit.y, strict=True) if at == x]) for x in xs
        ]
        name = _plain(", ".join(fit.labels.values()))
        points = axis.errorbar(
            xs, [s.mean for s in spreads], yerr=[s.deviation or 0.0 for s in spreads],
            fmt="o", capsize=3, label=name or "runs",
        )  # fmt: skip
        ratio = (xs[-1] / xs[0]) ** (1 / 50)
        line = [xs[0] * ratio**i for i in range(51)]
        law = f"{fit.law.a:.3g}·x^{-fit.law.b:.3f}"
        axis.plot(line, [fit.law.at(x) for x in line], "--", color=points[0].get_color(), label=law)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for formatted in (axis.yaxis.set_minor_formatter, axis.yaxis.set_major_formatter):
        formatted("{x:.4g}")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set(xlabel=report.study.file.report.fit, ylabel=report.measure)
    axis.legend(frameon=False, fontsize="small")
    return _png(figure)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _plain(name: str) -> str:
    """A name in which `$` is no formula and a leading "_" hides nothing."""
    return name.replace("$", r"\$").lstrip("_")
