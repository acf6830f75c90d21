"""A run as one HTML page that needs neither network nor scripts."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Iterator
from html import escape
from typing import Any

import megaswitch
from megaswitch.cli.charts import heat_map, line_chart
from megaswitch.cli.run_view import RunView, duration, words_of
from megaswitch.config import to_toml

# Whatever stands in a run's files, the browser loads nothing and runs nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #eee; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(28rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; } svg .end { text-anchor: end; }
svg polyline { fill: none; stroke-width: 1.5; } svg .grid { stroke: #e4e4e4; }
pre { overflow-x: auto; background: #f6f6f6; padding: 1rem; }
.warn td:nth-child(2) { color: #b3261e; }
"""
_CHARTS = (
    ("Loss, nats per target token", (("training", "loss"), ("validation", "valid/loss"),
                                     ("validation, text tokens", "valid/content_loss"))),
    ("Accuracy", (("training", "accuracy"), ("validation", "valid/accuracy"))),
    ("Tokens per second", (("all ranks", "tokens_per_second"),)),
    ("MFU", (("of the devices' peak", "mfu"),)),
    ("Gradient norm before clipping", (("global", "grad_norm"),)),
    ("Learning rate", (("rate", "learning_rate"),)),
    ("Dropped tokens", (("all layers", "dropped_fraction"),)),
    ("Busiest expert ÷ an even share", (("mean over layers", "load_imbalance"),)),
)  # fmt: skip
_GOOD = ("resumed", "checkpoint")
_MOMENTS = 24  # rows of a layer's history
_LAYERS = 12


def page(view: RunView) -> str:
    """The page."""
    title = escape("/".join(view.path.absolute().parts[-2:]))
    sections = [
        _summary(view),
        _charts(view),
        *_experts(view),
        _events(view),
        _checkpoints(view),
        _starts(view),
        f"<h2>Configuration</h2><details><summary>config.toml</summary><pre>"
        f"{escape(to_toml(view.config))}</pre></details>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )


def _summary(view: RunView) -> str:
    steps = view.config.train.steps
    rows: list[tuple[str, str]] = [
        ("progress", f"step {view.step:,} of {steps:,} ({view.step / steps:.0%})"),
        ("model", f"{view.config.model.preset or 'no preset'}, "
                  f"{view.config.model.moe.num_experts or 'no'} experts"),
        ("trained by", view.holder or "nobody just now"),
    ]  # fmt: skip
    if training := view.series("loss"):
        rows.append(("training loss", f"{training[-1][1]:.4f}"))
    if valid := view.series("valid/loss"):
        rows.append(("validation loss", f"{valid[-1][1]:.4f} at step {valid[-1][0]:,}"))
    now = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    rows.append(("this page", f"{now} by MegaSwitch {megaswitch.__version__}"))
    return _table(rows)


def _charts(view: RunView) -> str:
    figures = []
    for title, curves in _CHARTS:
        drawn = line_chart([(name, view.series(key)) for name, key in curves], title)
        if drawn:
            figures.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>")
    body = f'<div class="charts">{"".join(figures)}</div>' if figures else "<p>No step yet.</p>"
    return f"<h2>Curves</h2>{body}"


def _experts(view: RunView) -> Iterator[str]:
    if not view.experts:
        return
    newest = view.experts[-1]
    yield "<h2>Load of experts ÷ an even share</h2><p>White: none; blue: even; red: three times "
    yield f"that and more. All layers at step {newest['step']:,}:</p>"
    yield heat_map(list(newest["loads"].items()), "load of experts by layer")
    step = -(-len(view.experts) // _MOMENTS)
    moments = view.experts[::-1][::step][::-1]
    for layer in list(newest["loads"])[:_LAYERS]:
        rows = [(f"step {m['step']:,}", m["loads"][layer]) for m in moments if layer in m["loads"]]
        yield f"<details><summary>{escape(layer)} over time</summary>"
        yield heat_map(rows, f"load of experts of {layer}") + "</details>"


def _events(view: RunView) -> str:
    shown = [e for e in view.events if e["event"] != "checkpoint"]
    rows = "".join(
        f'<tr class="{"" if event["event"] in _GOOD else "warn"}">'
        + "".join(
            f"<td>{escape(str(cell))}</td>"
            for cell in (
                event["time"][:19],
                event["event"],
                f"step {event['step']:,}",
                words_of(event),
            )
        )
        + "</tr>"
        for event in shown
    )
    body = f"<table>{rows}</table>" if rows else "<p>Nothing.</p>"
    return f"<h2>What happened</h2>{body}"


def _checkpoints(view: RunView) -> str:
    written = [e for e in view.events if e["event"] == "checkpoint"]
    rows = [(f"step {step:,}", f"{duration(age)} old") for step, age in view.checkpoints]
    body = _table(rows) if rows else "<p>None yet.</p>"
    stalls = [e["stall_seconds"] for e in written if isinstance(e.get("stall_seconds"), float)]
    if stalls:
        body += (
            f"<p>{len(written)} written in all; training waited {sum(stalls) / len(stalls):.3f} s "
            f"for each on average, {max(stalls):.3f} s at most.</p>"
        )
    return f"<h2>Checkpoints</h2>{body}"


def _starts(view: RunView) -> str:
    parts = []
    for start in view.starts:
        rows = [(key, _words(value)) for key, value in start.items() if value not in (None, {}, [])]
        parts.append(f"<details><summary>{escape(str(start.get('time', '')))}</summary>"
                     f"{_table(rows)}</details>")  # fmt: skip
    return f"<h2>Starts and their environment</h2>{''.join(parts) or '<p>None noted.</p>'}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_words(held)}" for key, held in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><th>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"
