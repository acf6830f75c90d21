"""`megaswitch convert upcycle` and `prune`: dense to sparse, and to fewer experts."""

from __future__ import annotations

from pathlib import Path

import click

from megaswitch.cli.common import PATH, echo
from megaswitch.log import UserError

_MOST_DIFFERENCE = 1e-2  # of an upcycled model's logits, over the largest


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH)
@click.option("--num-experts", "experts", type=click.IntRange(min=1), required=True,
              help="Experts of each Switch layer.")  # fmt: skip
@click.option("--every", type=click.IntRange(min=1), default=2, show_default=True,
              help="Every n-th layer of both stacks becomes sparse.")  # fmt: skip
@click.option("--group-size", type=click.IntRange(min=1), show_default="about 1024",
              help="Encoder tokens routed together, of whole rows.")  # fmt: skip
@click.option("--capacity-factor", type=click.FloatRange(min=0, min_open=True), default=1.25,
              show_default=True, help="Slots per expert in training.")  # fmt: skip
@click.option("--noise", type=click.FloatRange(min=0), default=0.0, show_default=True,
              help="Added to each expert, relative to its matrices' RMS.")  # fmt: skip
@click.option("--router-scale", type=click.FloatRange(0, 1, min_open=True), default=1e-3,
              show_default=True, help="Of the fresh router's weights.")  # fmt: skip
@click.option("--output-scale", type=click.FloatRange(min=0, min_open=True),
              show_default="the number of experts",
              help="Of the experts' last matrices.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True,
              help="Of router and noise.")  # fmt: skip
@click.option("--check", is_flag=True,
              help="Run both models on random tokens and compare their logits.")  # fmt: skip
def upcycle(checkpoint: Path, output: Path, every: int, check: bool, **request: float) -> None:
    """Make a Switch model of a dense checkpoint: each expert starts as a copy of its FFN.

    CHECKPOINT is a checkpoint or a run folder, whose newest is taken; OUTPUT is the folder to
    write. The router is fresh and undecided, and the experts' output is scaled by their number, so
    that with its probability of 1/E the new model computes what the dense one does, until it is
    trained. --check proves it, for tokens that find a place.

    Then train it with model.moe as in OUTPUT/config.toml, and its weights to start with.

    \b
    Examples:
      megaswitch convert upcycle runs/t5-base switch-base-8 --num-experts 8 --check
      megaswitch convert upcycle runs/t5-base switch-base-32 --num-experts 32 --noise 0.01
    """
    from megaswitch.checkpoint.manager import find_checkpoint, read_config
    from megaswitch.checkpoint.upcycle import Recipe, compare
    from megaswitch.checkpoint.upcycle import upcycle as run
    from megaswitch.config import MoEConfig

    length = read_config(find_checkpoint(checkpoint)).data.encoder_length
    moe = MoEConfig(
        num_experts=int(request["experts"]),
        encoder_sparse_step=every,
        decoder_sparse_step=every,
        group_size=int(request["group_size"] or max(1, round(1024 / length)) * length),
        train_capacity_factor=request["capacity_factor"],
    )
    recipe = Recipe(
        moe,
        noise=request["noise"],
        router_scale=request["router_scale"],
        output_scale=request["output_scale"],
        seed=int(request["seed"]),
    )
    run(checkpoint, output, recipe)
    echo(f"{output}: {moe.num_experts} experts in one of {every} layers")
    if not check:
        return
    found = compare(checkpoint, output)
    echo(f"logits differ by at most {found.difference:.1e} of the largest, where all tokens find a")
    echo(f"place; at the capacity of evaluation {found.dropped:.1%} of random tokens find none")
    if recipe.keeps_function and found.difference > _MOST_DIFFERENCE:
        raise UserError(
            f"{output} does not compute what {checkpoint} does: logits differ by "
            f"{found.difference:.1e}, and must by less than {_MOST_DIFFERENCE:.0e}; use a smaller "
            "--router-scale"
        )


@click.command()
@click.argument("checkpoint", type=PATH)
@click.argument("output", type=PATH)
@click.option("--num-experts", "experts", type=click.IntRange(min=1), required=True,
              help="Experts left in each Switch layer.")  # fmt: skip
@click.option("--usage", type=PATH, required=True,
              help="What megaswitch evaluate --json printed of its experts' use.")  # fmt: skip
@click.option("--merge", is_flag=True,
              help="Average the other experts into those that stay, by use.")  # fmt: skip
def prune(checkpoint: Path, output: Path, experts: int, usage: Path, merge: bool) -> None:
    """Make a smaller Switch model of the experts that are used most.

    CHECKPOINT is a checkpoint or a run folder, whose newest is taken; OUTPUT is the folder to
    write. Router rows follow their experts, so tokens of those that go find another one.

    \b
    Examples:
      megaswitch evaluate runs/switch-64 data/valid --json > usage.json
      megaswitch convert prune runs/switch-64 switch-16 --num-experts 16 --usage usage.json
      megaswitch convert prune runs/switch-64 merged --num-experts 16 --usage u.json --merge
    """
    from megaswitch.checkpoint.prune import prune as run

    run(checkpoint, output, usage, experts, merge=merge)
    how = "with the others merged in" if merge else "as they were"
    echo(f"{output}: the {experts} most used experts of each Switch layer, {how}")
