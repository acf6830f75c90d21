"""On a GPU: a whole training step of Switch-Base-64, of a dense T5 of equal FLOPs, and of HF's.

16 rows of 512 and 114 tokens, bf16 autocast, AdamW. `speed` is the dense model's time by the
variant's. Backends and FP8 recipes come with --te; HF's models are timed as they are and compiled.
Command: python tools/benchmarks/step_gpu.py --output step_gpu.json
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clocks import compare_on_gpu, peak_memory
from side_by_side import record
from step import hf_like, hf_loss
from torch import Tensor, nn

from megaswitch.config import RunConfig, load_config
from megaswitch.data.span_corruption import Seq2SeqBatch
from megaswitch.layers.noise import Noise
from megaswitch.model.count import count
from megaswitch.optim.build import build_optimizer, clip_gradients
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.metrics import peak_flops
from megaswitch.train.objectives import BatchSize, MicroBatch
from megaswitch.train.parts import build_parts
from megaswitch.train.runner import Runner

ROWS, LENGTHS = 16, (512, 114)
GPU = torch.device("cuda")
Step = Callable[[], None]


def config_of(preset: str, *options: str) -> RunConfig:
    """A run of `ROWS` rows."""
    sizes = [f"--train.micro_batch_size={ROWS}", f"--train.batch_size={ROWS}"]
    optim = ["--optim.name=adamw", "--optim.learning_rate=1e-6", "--train.precision=bf16"]
    return load_config(None, [f"--model.preset={preset}", *sizes, *optim, *options])


def tokens() -> list[Tensor]:
    """Encoder tokens, decoder tokens and targets, without padding."""
    return [torch.randint(3, 32_000, (ROWS, n)) for n in (*LENGTHS, LENGTHS[1])]


def our_step(
    config: RunConfig, batch: list[Tensor]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step as `Trainer` makes it, and its optimizer alone."""
    encoder, decoder, targets = batch
    samples = torch.arange(ROWS)
    full = Seq2SeqBatch(
        encoder_tokens=encoder,
        decoder_tokens=decoder,
        decoder_targets=targets,
        encoder_mask=torch.ones_like(encoder, dtype=torch.bool),
        decoder_mask=torch.ones_like(decoder, dtype=torch.bool),
        sample_index=samples,
    )
    micro = MicroBatch.of(full, GPU, Noise(0, 0, samples.cuda()))
    mesh = Mesh.start("cuda", config.parallel)
    parts = build_parts(config, mesh)
    parts.initialize(0)
    parts.train()
    runner, optimizer = (
        Runner(config, mesh, parts),
        build_optimizer(parts.parameters(), config.optim),
    )
    whole = BatchSize(ROWS, targets.numel())

    def update() -> None:
        clip_gradients(parts.parameters(), None, mesh)
        optimizer.step()

    def step() -> None:
        runner.backward([micro], whole, lambda *_: None)
        parts.gradients.finish()
        parts.backend.finish_step()
        update()
        parts.gradients.clear()

    step()
    runner.backward([micro], whole, lambda *_: None)  # gradients for `update` alone
    return step, update


def hf_step(config: RunConfig, batch: list[Tensor], *, compiled: bool) -> Callable[[], None]:
    """A step of HF's model of the same shape, written as its users write it."""
    from megaswitch.model.switch_transformer import SwitchTransformer

    model: nn.Module = hf_like(SwitchTransformer(config.model).initialize(0)).to(GPU).train()
    run: Any = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    on_gpu = [t.to(GPU) for t in batch]
    more = {"output_router_logits": True} if config.model.moe.num_experts else {}

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = hf_loss(run, on_gpu, **more)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def add(
    steps: dict[str, Any], name: str, make: Callable[[], Any], failures: dict[str, str]
) -> None:
    """Add a variant; one that cannot be made, or not run once, is told and left out."""
    try:
        made = make()
        (made[0] if isinstance(made, tuple) else made)()
        steps[name] = made
    except Exception as error:
        failures[name] = (
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        )
        print(f"{name}: {failures[name]}")


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--te", action="store_true", help="Transformer Engine, too")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batch, made, failures = tokens(), {}, {}  # type: ignore[var-annotated]
    dense, switch = config_of("t5-base"), config_of("switch-base-64")
    add(made, "dense", lambda: our_step(dense, batch), failures)
    add(made, "switch", lambda: our_step(switch, batch), failures)
    recipes = ("none", "delayed", "current", "block") if arguments.te else ()
    for recipe in recipes:
        options = ["--train.backend=te"]
        options += [f"--train.fp8.recipe={recipe}"] if recipe != "none" else []
        for name in ("t5-base", "switch-base-64"):
            config = config_of(name, *options)
            add(made, f"{name}, te {recipe}", lambda c=config: our_step(c, batch), failures)
    for compiled in (False, True):
        for name, config in (("HF T5", dense), ("HF Switch", switch)):
            label = f"{name}{', compiled' if compiled else ''}"
            make = lambda c=config, k=compiled: hf_step(c, batch, compiled=k)  # noqa: E731
            add(made, label, make, failures)
    steps = {n: m[0] if isinstance(m, tuple) else m for n, m in made.items()}
    results: dict[str, Any] = {"step": compare_on_gpu(steps, rounds=arguments.rounds, calls=2)}
    updates = {n: m[1] for n, m in made.items() if isinstance(m, tuple)}
    results["optimizer"] = compare_on_gpu(updates, rounds=5)
    results["peak_bytes"] = {name: peak_memory(step) for name, step in steps.items()}
    peak = peak_flops(GPU, torch.bfloat16)
    for name, config in (("dense", dense), ("switch", switch)):
        sizes = count(config.model, encoder_length=LENGTHS[0], decoder_length=LENGTHS[1])
        seconds = results["step"][name]["seconds"] if name in steps else float("nan")
        figures = results["step"].setdefault(name, {})
        figures["tokens_per_second"] = ROWS * sum(LENGTHS) / seconds
        if peak:
            figures["mfu"] = 3 * ROWS * sizes.forward_flops_per_sequence / seconds / peak
    results["failures"] = failures
    record("tools/benchmarks/step_gpu.py", results, arguments.output)


if __name__ == "__main__":
    main()
