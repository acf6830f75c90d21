"""Two small tasks over the made-up text of `text_run`."""

import json
import random
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tasks(text_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lang.toml`, and train and valid files of the tasks `lang` and `first`."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "lang.toml").write_text(
        'inputs = "lang: {text}"\nlabels = ["a", "b"]\nlabel = "lang"\nmetrics = ["accuracy"]\n'
    )
    draw = random.Random(1)
    texts = [json.loads(line) for line in (text_run / "texts.jsonl").open()]
    rows = [
        {"text": " ".join(draw.sample(t["text"].split(), 8)), "lang": t["lang"]}
        for t in texts
        for _ in range(3)
        if "lang" in t
    ]
    draw.shuffle(rows)
    for split, part in (("train", rows[60:]), ("valid", rows[:60])):
        (folder / f"lang_{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
        pairs = [{"inputs": r["text"], "targets": r["text"].split()[0]} for r in part[:100]]
        (folder / f"first_{split}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return folder


@pytest.fixture
def tuning(text_run: Path, tasks: Path, tmp_path: Path) -> list[str]:
    """Overrides of a short fine-tuning of `text_run` on both tasks, in `tmp_path/tuned`."""
    return [
        f"--train.init_from={text_run}/run",
        f"--train.run_dir={tmp_path}/tuned",
        f"--data.tasks.lang={tasks}/lang.toml",
        *(f"--data.train.{name}={tasks}/{name}_train.jsonl" for name in ("lang", "first")),
        *(f"--data.valid.{name}={tasks}/{name}_valid.jsonl" for name in ("lang", "first")),
        *("--data.encoder_length=32", "--data.decoder_length=8", "--model.moe.group_size=128"),
        *("--train.batch_size=8", "--train.micro_batch_size=4", "--train.steps=6"),
        *("--train.valid_interval=2", "--train.valid_samples=10", "--train.log_interval=1"),
        *("--train.device=cpu", "--optim.learning_rate=0.02"),
    ]
