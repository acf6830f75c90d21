"""`megaswitch presets`."""

from __future__ import annotations

import json
from typing import Any

import click

from megaswitch.cli.common import echo, stdout


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Machine-readable list.")
def presets(as_json: bool) -> None:
    """List the named models with their exact sizes.

    Forward FLOPs are of one sequence of 512 input and 114 target tokens.

    Example: megaswitch presets --json
    """
    import dataclasses

    from megaswitch.config import model_config
    from megaswitch.model.count import count
    from megaswitch.presets import PRESETS

    rows: list[dict[str, Any]] = []
    for name in PRESETS:
        config = model_config(name)
        shape = {
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "num_heads": config.num_heads,
            "num_encoder_layers": config.num_encoder_layers,
            "num_decoder_layers": config.num_decoder_layers,
            "num_experts": config.moe.num_experts,
        }
        rows.append({"name": name} | dataclasses.asdict(count(config)) | shape)
    if as_json:
        echo(json.dumps(rows, indent=2))
    else:
        _print_presets(rows)


def _print_presets(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    titles = ["total parameters", "active", "GFLOP/seq", "d_model", "d_ff", "heads", "layers"]
    table = Table("name", *titles, "experts", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['total_parameters']:,}",
            f"{row['active_parameters']:,}",
            f"{row['forward_flops_per_sequence'] / 1e9:,.1f}",
            *(str(row[k]) for k in ("d_model", "d_ff", "num_heads")),
            f"{row['num_encoder_layers']}+{row['num_decoder_layers']}",
            str(row["num_experts"] or "–"),
        )
    stdout().print(table)
