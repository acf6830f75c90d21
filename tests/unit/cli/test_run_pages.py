"""`megaswitch watch` and `megaswitch report`: what they show, whatever stands in a run's files."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from megaswitch.cli.charts import heat_map, line_chart, shade
from megaswitch.cli.run_view import RunView, duration
from megaswitch.config import load_config
from megaswitch.events import write_event
from megaswitch.parallel.mesh import Mesh
from megaswitch.train.environment import git_state, write_environment
from megaswitch.train.trainer import Trainer
from tests.unit.cli.commands import refusal, run

VOID = {"meta"}


@pytest.fixture(scope="module")
def done(tmp_path_factory, corpus):
    """A run of twelve steps, with an event of each kind of trouble."""
    folder = tmp_path_factory.mktemp("pages")
    options = [
        *("--model.vocab_size=192", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=64"),
        *("--model.num_heads=4", "--model.num_encoder_layers=2", "--model.num_decoder_layers=2"),
        *("--model.moe.num_experts=4", "--model.moe.group_size=128", f"--data.train={corpus}"),
        *(f"--data.valid={corpus}-valid", "--data.encoder_length=64", "--train.valid_samples=8"),
        *("--train.batch_size=4", "--train.micro_batch_size=4", "--train.steps=12"),
        *("--train.log_interval=1", "--train.valid_interval=4"),
        *("--checkpoint.interval=5", f"--train.run_dir={folder}/run", "--train.device=cpu"),
        *("--optim.schedule=constant", "--optim.learning_rate=0.05"),
    ]
    mesh = Mesh.start("cpu")
    (folder / "run").mkdir()
    write_environment(folder / "run", mesh)
    assert Trainer.build(load_config(None, options), mesh).fit()
    write_event(folder / "run", "skipped", 7, why="<script>alert(1)</script> & more", row=1)
    return folder / "run"


class Page(HTMLParser):
    """Checks that elements are closed in their order, and keeps what a browser would load."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_page_holds_all_that_it_shows(done, tmp_path, capsys):
    run("report", done, "--output", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert "script" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    for heading in ("Curves", "Load of experts", "What happened", "Checkpoints", "Configuration"):
        assert heading in page.text
    assert page.tags.count("polyline") >= 8
    assert page.tags.count("rect") >= 4 * 2 * 2  # experts, layers, newest and over time
    assert "<script>alert(1)</script> & more" in page.text
    assert "encoder.1.ffn" in page.text
    assert "step 12 of 12 (100%)" in page.text
    assert "num_experts = 4" in page.text


def test_a_page_without_steps_says_so(done, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(done / "config.toml", bare)
    run("report", bare)
    assert "No step yet." in Page((bare / "report.html").read_text()).text


def test_what_is_spoilt_is_left_out(done, tmp_path):
    spoilt = tmp_path / "spoilt"
    spoilt.mkdir()
    shutil.copy(done / "config.toml", spoilt)
    (spoilt / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": "x"}\n{"s')
    (spoilt / "experts.jsonl").write_text('{"step": 1, "loads": {"a": []}}\n{"step": 1}\n')
    (spoilt / "events.jsonl").write_text('{"time": 1}\n[]\n\xff\n')
    (spoilt / "environment.jsonl").write_text("[1]\nx\n")
    run("report", spoilt)
    run("watch", spoilt, "--once")
    assert RunView.read(spoilt).experts == []
    assert "is no run folder" in refusal("report", tmp_path)


def test_the_dashboard_shows_a_run(done, capsys):
    text = printed_by_watch(done, capsys)
    assert "step 12 of 12 (100%)" in text
    for title in ("training loss", "validation loss", "speed and router", "load of experts"):
        assert title in text
    assert re.search(r"checkpoint +step 12, \d+ (s|min) ago", text)
    assert re.search(r"encoder\.1\.ffn +[0-6!]{4} +\d\.\d\d … \d\.\d\d", text)
    assert "skipped" in text


def printed_by_watch(folder, capsys):
    capsys.readouterr()
    run("watch", folder)
    return capsys.readouterr().out


def test_a_run_folder_says_where_it_came_from(done):
    (start,) = [json.loads(line) for line in (done / "environment.jsonl").read_text().splitlines()]
    assert start["ranks"] == 1
    assert start["packages"]["torch"]
    assert start["hosts"]


def test_the_state_of_the_source_tree(tmp_path):
    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init", "-b", "main")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_state(tmp_path)["changed"] == []
    (tmp_path / "file").write_text("2")
    state = git_state(tmp_path)
    assert state["changed"] == ["file"]
    assert state["branch"] == "main"
    assert len(state["commit"]) == 40


@pytest.mark.parametrize(
    "points",
    [[], [(1, 2.0)], [(1, 2.0), (2, 2.0)], [(1, float("nan")), (2, float("inf"))],
     [(i, 1e-9 * i) for i in range(5000)], [(1, -1e300), (2, 1e300)]],
)  # fmt: skip
def test_any_curve_is_drawn(points):
    text = line_chart([("a<b", points), ("b", points)], "of & all")
    finite = [p for p in points if abs(p[1]) < float("inf")]
    assert bool(text) == bool(finite)
    if text:
        Page(text)
        assert "nan" not in text.replace("a&lt;b", "")
        assert max(len(m.split()) for m in re.findall('points="([^"]*)"', text)) <= 601


def test_shades_and_times():
    assert shade(0.0) == "#f5f5f5"
    assert shade(1.0) == "#1f5f8b"
    assert shade(3.0) == shade(30.0)
    assert shade(float("nan")) == "#888888"
    assert heat_map([], "nothing") == ""
    assert [duration(s) for s in (5, 600, 9000, 259200)] == ["5 s", "10 min", "2.5 h", "3.0 days"]


BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome")
     if (path := shutil.which(name))), None,
)  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path")
def test_a_browser_opens_the_page_without_network(done, tmp_path):
    run("report", done, "--output", tmp_path / "page.html")
    words = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             f"--user-data-dir={tmp_path}/profile", "--host-resolver-rules=MAP * ~NOTFOUND",
             "--enable-logging=stderr", "--virtual-time-budget=2000"]  # fmt: skip
    page = f"file://{tmp_path}/page.html"
    picture = tmp_path / "page.png"
    shown = subprocess.run(
        [*words, "--dump-dom", page], capture_output=True, text=True, timeout=240, check=True
    )
    assert shown.stdout.count("<polyline") >= 8
    assert "<script>" not in shown.stdout
    assert "ERR_" not in shown.stderr
    assert "Content Security Policy" not in shown.stderr  # nothing had to be refused
    subprocess.run(
        [*words, "--window-size=1200,2000", f"--screenshot={picture}", page],
        capture_output=True, timeout=240, check=True,
    )  # fmt: skip
    assert picture.stat().st_size > 20_000
