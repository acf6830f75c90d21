"""`megaswitch distill`."""

from __future__ import annotations

from pathlib import Path

import click

from megaswitch.cli.common import PATH, joined
from megaswitch.cli.completion import FREE_FORM, OverridesCommand, complete_override
from megaswitch.log import ConfigError


@click.command(cls=OverridesCommand, context_settings=FREE_FORM)
@click.option("--cache", is_flag=True,
              help="Run the teacher alone; its probabilities go to distill.logits.")  # fmt: skip
@click.argument("config", type=PATH)
@click.argument("overrides", nargs=-1, type=click.UNPROCESSED, shell_complete=complete_override)
@click.pass_context
def distill(context: click.Context, config: Path, overrides: tuple[str, ...], cache: bool) -> None:
    """Train the student of a TOML file with a teacher, or go on where its run stopped.

    OVERRIDES are --section.key=value and win over the file. The student starts with the weights of
    distill.teacher that are no experts, and its loss is (1 - f)·hard + f·T²·soft with
    f = distill.soft_weight and T = distill.temperature. All else is as in `megaswitch train`.

    The teacher runs along, spread over the same ranks by parallel.tp and parallel.ep. If
    distill.logits is set, it does not: its likeliest tokens are read from that folder, which the
    same command with --cache writes before.

    \b
    Examples:
      megaswitch distill student.toml --distill.teacher=runs/switch-64
      megaswitch distill student.toml --cache --distill.logits=data/teacher
      torchrun --nproc-per-node 8 --no-python megaswitch distill student.toml --parallel.ep=4
    """
    from megaswitch.cli.train import train
    from megaswitch.config import load_config
    from megaswitch.parallel.launcher import world_size

    resolved = load_config(config, overrides, world_size=world_size())
    missing = ["teacher"] if resolved.distill.teacher is None else []
    missing += ["logits"] if cache and resolved.distill.logits is None else []
    if missing:
        raise ConfigError([f"distill.{name} is not set; give a folder" for name in missing])
    if not cache:
        context.invoke(train, config=config, overrides=overrides)
        return
    from megaswitch.train.cache_logits import cache_logits
    from megaswitch.train.distill import find_teacher

    find_teacher(resolved, world_size(), runs=True)
    with joined(resolved.train.device, resolved.parallel) as (mesh, watchdog):
        watchdog.at(0, "the teacher's forward passes", limited=False)
        cache_logits(resolved, mesh)
