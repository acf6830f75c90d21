"""The demo, step by step: tokenizer → tokens → training → curve → filled-in blanks.

Every step is a command that you can run yourself; the script prints each before it runs it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import megaswitch
from megaswitch.checkpoint.manager import find_checkpoint, read_config
from megaswitch.data.prompts import spans
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.metrics_file import read_metrics
from megaswitch.train.trainer import build_loader

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/demo")
CORPUS = "examples/data/classics.jsonl.zst"


def run(command: str) -> None:
    """Show a command and run it; its failure ends the demo."""
    print(f"\n\033[1m$ {command}\033[0m" if sys.stdout.isatty() else f"\n$ {command}", flush=True)
    program, *arguments = shlex.split(command)
    # One thread for each of two processes: what torchrun would set, but for its warning.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = Path(sys.executable).with_name(program)
    subprocess.run([str(path), *arguments], check=True, env=environment)


def plot(metrics: list[dict[str, float]], path: Path) -> None:
    """Draw the training loss, the held-out text loss and its unigram baseline."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    training = [(m["step"], m["loss"]) for m in metrics if "loss" in m]
    valid = [m for m in metrics if "valid/content_loss" in m]
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(*zip(*training, strict=True), color="0.7", label="training, all targets")
    steps = [m["step"] for m in valid]
    axes.plot(steps, [m["valid/content_loss"] for m in valid], "o-", label="held-out text")
    entropy = valid[-1]["valid/content_unigram_entropy"]
    axes.axhline(entropy, ls="--", color="tab:red", label="its unigram entropy")
    axes.set(xlabel="step", ylabel="nats per token", title="A Switch Transformer on a laptop")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def fill_in(passages: int = 3) -> None:
    """Print held-out passages with each blank as [the model's guess | what the book says]."""
    checkpoint = find_checkpoint(RUN)
    tokenizer = Tokenizer(checkpoint / "tokenizer.model")
    model = megaswitch.load_model(checkpoint)
    batch = build_loader(read_config(checkpoint), "valid").batch(range(passages)).to("cpu")
    length = batch.decoder_targets.shape[1]
    guesses = megaswitch.generate(model, batch.encoder_tokens, max_tokens=length).tokens
    for tokens in zip(batch.encoder_tokens, batch.decoder_targets, guesses, strict=True):
        text, target, guess = (tokenizer.decode(row.tolist()) for row in tokens)
        guessed = spans(guess)
        for number, truth in spans(target).items():
            blank = f"[{guessed.get(number, '')} | {truth}]"
            text = text.replace(f"<extra_id_{number}>", blank)
        print(textwrap.indent(textwrap.fill(text, 96), "  "), end="\n\n")


def main() -> None:
    """Run the demo from the repository's root, from scratch."""
    started = time.time()
    shutil.rmtree(RUN, ignore_errors=True)
    (RUN / "data").mkdir(parents=True)
    run(f"megaswitch tokenizer train {CORPUS} --output {RUN}/data/spm.model --vocab-size 2048")
    run(
        f"megaswitch preprocess {CORPUS} --tokenizer {RUN}/data/spm.model "
        f"--output {RUN}/data/classics --valid-fraction 0.05"
    )
    training = time.time()
    run("torchrun --nproc-per-node 2 -m megaswitch train examples/demo.toml")
    trained = time.time()

    metrics = read_metrics(RUN / "metrics.jsonl")
    plot(metrics, RUN / "loss.png")
    last = next(m for m in reversed(metrics) if "valid/content_loss" in m)
    loss, entropy = last["valid/content_loss"], last["valid/content_unigram_entropy"]
    print(f"\nHeld-out text tokens: loss {loss:.3f}, their unigram entropy {entropy:.3f}:")
    print(f"the model is {entropy - loss:.3f} nats better than knowing how frequent words are.")
    print("\nIt fills in blanks of pages it never saw, [its guess | what the book says]:\n")
    fill_in()
    minutes = (trained - training) / 60, (time.time() - started) / 60
    print(f"\nTraining took {minutes[0]:.1f} minutes, the whole demo {minutes[1]:.1f}.")
    print(f"The curve is {RUN}/loss.png; `tensorboard --logdir {RUN}` shows every metric.")
    print(
        "\nWhat to try next, after `source .venv/bin/activate`:\n"
        '  megaswitch generate runs/demo "It was a <extra_id_0> day on the <extra_id_1>."\n'
        "  megaswitch evaluate runs/demo runs/demo/data/classics_valid --plot router.png\n"
        "  megaswitch inspect runs/demo\n"
        "  megaswitch train examples/demo.toml --train.run_dir=runs/32 --model.moe.num_experts=32\n"
        "  megaswitch train examples/demo.toml --train.run_dir=runs/dense --model.preset=t5-tiny\n"
        "  megaswitch presets        the models of the paper, counted to the last parameter"
    )


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
