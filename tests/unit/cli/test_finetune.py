"""`megaswitch finetune`, `evaluate --task`, `merge` and `preprocess --task` as users meet them."""

import json
from pathlib import Path

import click
import pytest

from megaswitch.config import from_toml
from megaswitch.data.indexed import TokenStore
from megaswitch.data.tasks import builtin_tasks, find_task
from megaswitch.data.tokenizer import Tokenizer
from megaswitch.train.finetune import finetune_config
from tests.unit.cli.commands import printed, refusal, run
from tests.unit.train.conftest import tasks, tuning  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _signals(monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)


def test_from_the_command_line_to_readable_predictions(text_run, tuning, tasks, tmp_path, capsys):  # noqa: F811
    run("finetune", "--from", text_run / "run", *tuning[1:], "--train.steps=2")
    out = capsys.readouterr()
    assert "fine-tuning" in out.err
    assert "adafactor, constant 0.02 · dropout 0.1, 0.4 in experts" in out.err
    assert "best of lang, on 10 held-out examples: accuracy" in out.err
    best = tmp_path / "tuned" / "checkpoints" / "best"
    arguments = (
        *("evaluate", best, "--output", tmp_path / "answers", "--device", "cpu"),
        *("--task", f"lang={tasks}/lang_valid.jsonl", "--task", f"pairs={tasks}/first_*.jsonl"),
    )
    table = printed(capsys, *arguments)
    found = json.loads(printed(capsys, *arguments, "--json"))
    assert [(t["task"], t["examples"]) for t in found["tasks"]] == [("lang", 60), ("pairs", 160)]
    accuracy = found["tasks"][0]["figures"]["accuracy"]
    assert f"accuracy {accuracy:.2f}" in table
    lines = [json.loads(s) for s in (tmp_path / "answers" / "lang.jsonl").open(encoding="utf-8")]
    assert lines[0].keys() == {"inputs", "target", "prediction", "score", "scores"}
    assert lines[0]["inputs"].startswith("lang: ")
    right = sum(line["target"] == line["prediction"] for line in lines)
    assert accuracy == pytest.approx(100 * right / 60)
    assert all(line["score"] == max(line["scores"].values()) for line in lines)


def test_show_prints_what_would_run(text_run, tuning, tmp_path, capsys):  # noqa: F811
    text = printed(capsys, "finetune", "--from", text_run / "run", *tuning[1:], "--show")
    assert from_toml(text).model.moe.expert_dropout == 0.4
    assert not (tmp_path / "tuned").exists()


def test_the_public_tasks_are_listed(capsys):
    text = printed(capsys, "finetune", "--tasks")
    assert all(name in text for name in builtin_tasks())


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/finetune/*.toml")), ids=lambda p: p.name
)
def test_examples_load(path, text_run):
    if path.name.endswith(".task.toml"):
        find_task(str(path))
        return
    config = finetune_config(path, [f"--train.init_from={text_run}/run"])
    assert config.data.tasks.keys() == {**config.data.train, **config.data.valid}.keys()
    for name, definition in config.data.tasks.items():
        find_task(str(ROOT / definition) if definition.endswith(".toml") else definition)
        assert definition != "pairs", name


def test_adapters_are_merged_by_a_command(text_run, tuning, tmp_path, capsys):  # noqa: F811
    run("finetune", *tuning, "--train.steps=1", "--model.lora.rank=2")
    run("merge", tmp_path / "tuned", "--output", tmp_path / "merged")
    assert "merged into" in capsys.readouterr().err
    run("finetune", "--from", tmp_path / "merged", *tuning[1:], "--train.steps=1",
        f"--train.run_dir={tmp_path}/again")  # fmt: skip


def test_preprocess_makes_pairs_of_a_task(text_run, tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nbafa beku\t1\nlopi\t0\n")
    spm = text_run / "spm.model"
    run("preprocess", path, "--task", "sst2", "--tokenizer", spm, "--output", tmp_path / "sst2")
    tokenizer = Tokenizer(spm)
    texts = [
        [tokenizer.decode(store.document(i).tolist()) for i in range(2)]
        for store in (TokenStore(tmp_path / f"sst2_{end}") for end in ("inputs", "targets"))
    ]
    assert texts[0][0] == "sst2 sentence: bafa beku"
    assert texts[1] == ["positive", "negative"]


def test_what_evaluate_refuses(text_run, tasks, tmp_path):  # noqa: F811
    checkpoint, valid = text_run / "run", tasks / "lang_valid.jsonl"
    for task, message in (
        ("lang", "must be NAME=FILES"),
        (f"sst-2={valid}", "did you mean sst2"),
        ("sst2=nowhere.tsv", "no task file 'nowhere.tsv'"),
        (f"sst2={valid}", "no example of task 'sst2'"),
        (f"sst2={text_run}/spm.model", "is no kind of file"),
    ):
        assert message in refusal("evaluate", checkpoint, "--task", task)
    (tmp_path / "file").write_text("")
    both = f"{tasks}/lang.toml={valid}"
    assert "is a file" in refusal(
        "evaluate", checkpoint, "--task", both, "--output", tmp_path / "file"
    )
    for words in (["--task", both, "data"], ["--task", both, "--seed", "3"], [],
                  ["data", "--output", "x"]):  # fmt: skip
        with pytest.raises(click.UsageError):
            run("evaluate", checkpoint, *words)


def test_two_configurations_are_refused():
    with pytest.raises(click.UsageError, match="one CONFIG is read"):
        run("finetune", "a.toml", "b.toml")
