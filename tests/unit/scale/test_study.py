"""Studies: what a file expands to, what is wrong with it, how its jobs are run and reported."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megaswitch.log import ConfigError, UserError
from megaswitch.metrics_file import read_metrics
from megaswitch.scale import run_study
from megaswitch.scale.report import make_report, markdown
from megaswitch.scale.run_study import command, is_finished, prepare, run_jobs, slurm_script
from megaswitch.scale.study import load_study, toml_value
from tests.unit.cli.commands import megaswitch, printed, refusal, report, start

BASE = """
[model]
vocab_size = 192
d_model = 32
d_kv = 8
d_ff = 64
num_heads = 4
num_encoder_layers = 2
num_decoder_layers = 2
[optim]
schedule = "constant"
learning_rate = 0.05
warmup_steps = 0
[train]
batch_size = 4
micro_batch_size = 4
device = "cpu"
log_interval = 1
valid_interval = 4
valid_samples = 8
steps = 4
"""


@pytest.fixture
def write(tmp_path, corpus):
    """Writes study.toml and base.toml; returns the path."""

    def write(text):
        data = f'[data]\ntrain = "{corpus}"\nvalid = "{corpus}-valid"\nencoder_length = 64\n'
        (tmp_path / "base.toml").write_text(BASE + data)
        path = tmp_path / "study.toml"
        head = f'title = "A <study>"\nbase = "base.toml"\nruns = "{tmp_path}/runs"\n'
        path.write_text(head + text)
        return path

    return write


AXES = """
[set]
train.log_interval = 2
[axes.experts]
model.moe.num_experts = [2, 4]
model.moe.group_size = [64, 128]
[axes.seed]
train.seed = [1, 2, 3]
"""


def test_keys_of_an_axis_go_together_and_axes_are_crossed(write):
    study = load_study(write(AXES), ["--train.steps=7"])
    found = [
        (j.name, j.config.model.moe.num_experts, j.config.model.moe.group_size, j.config.train.seed)
        for j in study.jobs
    ]
    assert found == [
        (f"experts={e},seed={s}", e, g, s) for e, g in ((2, 64), (4, 128)) for s in (1, 2, 3)
    ]
    assert {(j.config.train.steps, j.config.train.log_interval) for j in study.jobs} == {(7, 2)}
    assert study.jobs[4].labels == {"experts": "4", "seed": "2"}
    assert [j.index for j in study.jobs] == list(range(6))
    assert all(j.config.train.run_dir == str(study.runs / j.name) for j in study.jobs)


def test_cases_may_change_different_keys(write):
    study = load_study(
        write("""
[axes.model]
dense = {}
"2 experts" = { model.moe.num_experts = 2, model.moe.group_size = 64 }
[axes.model.big]
"model.d_ff" = 128
""")
    )
    assert [j.name for j in study.jobs] == ["model=dense", "model=2-experts", "model=big"]
    shapes = [(j.config.model.d_ff, j.config.model.moe.num_experts) for j in study.jobs]
    assert shapes == [(64, 0), (64, 2), (128, 0)]


def test_places_are_filled_in_and_a_study_without_axes_is_one_run(write, tmp_path):
    study = load_study(
        write('[set]\ndata.train = { a = "{runs}/a", b = "{here}/b" }\n'), runs=tmp_path / "other"
    )
    (job,) = study.jobs
    assert job.config.data.train == {"a": f"{tmp_path}/other/a", "b": f"{tmp_path}/b"}
    assert job.folder == tmp_path / "other" / "run"


def test_the_usual_folder_is_named_after_the_study(tmp_path):
    (tmp_path / "experts").mkdir()
    for name, folder in (("experts/study.toml", "experts"), ("experts/long.toml", "long")):
        (tmp_path / name).write_text('title = "x"\n')
        assert load_study(tmp_path / name).runs == Path("runs/studies") / folder


@pytest.mark.parametrize(
    ("value", "text"),
    [("t5-tiny", "t5-tiny"), ("8", '"8"'), ("true", '"true"'), (True, "true"), (1.5, "1.5"),
     ([1, 2], "[1, 2]"), (["a"], '["a"]'), ({"a": "b"}, '{ "a" = "b" }')],
)  # fmt: skip
def test_values_are_written_so_that_they_are_read_as_they_were(value, text):
    assert toml_value(value) == text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nonsense = 1", "nonsense is not a known key of a study; known are title"),
        ("ranks = 0", "ranks is wrong"),
        ("[axes.a]\ntrain.seed = [1, 2]\ntrain.steps = [1]", "axes.a must give each of its keys"),
        ("[axes.a]\ntrain.seed = 1", "axes.a must give each of its keys"),
        ("[axes.a]\ntrain.seed = []", "axes.a must give each of its keys"),
        ("[axes.a]\ntrain.seed = [1, 1]", "axes.a has the value '1' 2 times"),
        ("[axes.a]\ntrain.seed = [1]\nx = {}", "axes.a mixes cases and keys"),
        ('[axes.a]\n"x y" = {}\n"x-y" = {}', "several runs are named a=x-y"),
        ("[axes.a]\ntrain.sede = [1]", "run a=1: train.sede is not a known key"),
        ('[report]\nfit = "b"\n[axes.a]\ntrain.seed = [1]', "report.fit='b' is no axis"),
        ('[report]\nbaseline.b = "1"\n[axes.a]\ntrain.seed = [1]', "baseline.b is no axis to"),
        ('[report]\nbaseline.seed = "1"\n[axes.seed]\ntrain.seed = [1]', "seed is no axis to"),
        (
            '[report]\nbaseline.a = "2"\n[axes.a]\ntrain.seed = [1]',
            "a='2' is no case of it; use one",
        ),
    ],
)
def test_what_is_wrong_with_a_study_is_said(write, text, problem):
    with pytest.raises(ConfigError) as caught:
        load_study(write(text))
    assert problem in str(caught.value)


def test_all_runs_problems_are_said_at_once_and_axes_stay_as_they_are(write):
    text = "[axes.experts]\nmodel.moe.num_experts = [2, 4]\n"
    with pytest.raises(ConfigError) as caught:
        load_study(write(text), ["--model.moe.num_experts=8", "--model.moe.group_size=100"])
    told = str(caught.value)
    assert "model.moe.num_experts is varied by an axis" in told
    assert "2 runs (experts=2, experts=4): model.moe.group_size=100" in told
    with pytest.raises(UserError, match="does not exist"):
        load_study(Path("nowhere.toml"))


SMALL = """
[axes.experts]
model.moe.num_experts = [1, 2]
model.moe.group_size = [64, 64]
[report]
fit = "experts"
"""


def test_a_study_runs_reports_a_failure_and_goes_on(write, tmp_path, capsys):
    path = write(SMALL)
    runs = tmp_path / "runs"
    (runs / "experts=1").mkdir(parents=True)
    (runs / "experts=1" / "checkpoints").write_text("a file where a folder must be")
    message = refusal("study", "run", path, "--jobs", "2")
    assert "1 of 2 runs failed" in message
    assert "experts=1: error: " in message
    study = load_study(path)
    assert [is_finished(job) for job in study.jobs] == [False, True]
    (runs / "experts=1" / "checkpoints").unlink()
    first = (runs / "experts=2" / "metrics.jsonl").stat().st_mtime_ns
    printed(capsys, "study", "run", path)
    assert (runs / "experts=2" / "metrics.jsonl").stat().st_mtime_ns == first
    assert all(is_finished(job) for job in study.jobs)
    # Nor is a run that another study made and that was copied here.
    shutil.copytree(runs, tmp_path / "copy")
    assert all(is_finished(job) for job in load_study(path, runs=tmp_path / "copy").jobs)
    # A change of the study is no finished run, whatever lies there.
    changed = load_study(path, ["--optim.learning_rate=0.1"])
    assert not any(is_finished(job) for job in changed.jobs)

    text = printed(capsys, "study", "report", path)
    assert "| experts | runs | valid/loss | valid/content_loss | loss |" in text
    assert "| 1 | 1 of 1 |" in text
    assert "Note: no fit: a power law needs at least three" in text
    page = (runs / "report" / "index.html").read_text()
    assert "<h1>A &lt;study&gt;</h1>" in page
    assert page.count("data:image/png;base64,") == 1
    assert "src=" not in page.replace('src="data:', "")
    loss = read_metrics(runs / "experts=2" / "metrics.jsonl")[-1]["valid/loss"]
    found = report(capsys, "study", "report", path)
    assert found["rows"][1]["metrics"]["valid/loss"]["mean"] == loss


@pytest.mark.long
def test_a_killed_job_goes_on_from_its_checkpoint(write, tmp_path):
    text = "[set]\ncheckpoint.interval = 5\ntrain.steps = 300\n[axes.seed]\ntrain.seed = [1]\n"
    path = write(text)
    folder = tmp_path / "runs" / "seed=1"
    process = start("study", "run", path)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "step_00000005").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    stopped = read_metrics(folder / "metrics.jsonl")[-1]["step"]
    assert 5 <= stopped < 300
    done = megaswitch("study", "run", path)
    assert done.returncode == 0, done.stderr
    steps = [m["step"] for m in read_metrics(folder / "metrics.jsonl") if "loss" in m]
    assert steps == list(range(1, 301))
    assert (
        f"resuming from {folder}/checkpoints/step_{stopped:08d}"
        in (folder / "study.log").read_text()
    )


def test_what_is_needed_first_is_made_once(write, tmp_path, corpus):
    text = f"""
[[before]]
run = ["data", "split", "{corpus}", "--output", "{{runs}}/part", "--parts", "2"]
makes = "{{runs}}/part_00.idx"
[[before]]
run = ["presets", "--no-such-option"]
makes = "{{runs}}/nothing"
[[before]]
run = ["train", "--train.steps={{steps}}"]
makes = "{{runs}}/nothing/step_{{steps:08}}"
"""
    study = load_study(write(text), ["--train.steps=9"])
    last = study.file.before.pop()
    assert last.run == ["train", "--train.steps=9"]
    assert last.makes == f"{tmp_path}/runs/nothing/step_00000009"
    said = []
    with pytest.raises(UserError, match=r"did not make .*nothing: .*no-such-option"):
        prepare(study, said.append)
    made = tmp_path / "runs" / "part_00.idx"
    assert made.is_file()
    before = made.stat().st_mtime_ns
    (tmp_path / "runs" / "nothing").touch()
    prepare(study, said.append)
    assert made.stat().st_mtime_ns == before
    assert len(said) == 2


def test_several_ranks_are_started_by_torchrun(write, monkeypatch):
    study = load_study(write("ranks = 2\n"), ["--train.batch_size=8"])
    words = run_study._module(command(study, study.jobs[0]), ranks=2)
    assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert words[6:10] == ["-m", "megaswitch", "train", str(study.base)]


def test_an_array_has_a_task_for_each_run(write, tmp_path, capsys):
    path = write(AXES)
    printed(capsys, "study", "run", path, "--train.steps=9", "--jobs", "4", "--slurm",
            tmp_path / "a.sh")  # fmt: skip
    script = (tmp_path / "a.sh").read_text()
    assert "#SBATCH --array=0-5%4\n" in script
    assert f"study run {path} --train.steps=9 --only" in script
    subprocess.run(["bash", "-n", tmp_path / "a.sh"], check=True)
    assert "study.toml" in slurm_script(load_study(path), [str(path)], at_once=1)
    listed = printed(capsys, "study", "run", path, "--list")
    assert "   5  experts=4,seed=3" in listed
    assert "must be less than the 6 runs" in refusal("study", "run", path, "--only", "6")


def test_a_task_of_an_array_passes_the_signal_on(write, tmp_path, capsys):
    path = write("[axes.seed]\ntrain.seed = [1]\n")
    script = tmp_path / "a.sh"
    printed(capsys, "study", "run", path, "--slurm", script)
    fake = tmp_path / "python"
    fake.write_text(
        "#!/bin/bash\ntrap 'echo saved >> \"$0.log\"; sleep 0.3; exit 130' TERM\n"
        'echo "$@" >> "$0.log"\nwhile true; do sleep 0.05; done\n'
    )
    fake.chmod(0o755)
    import sys

    script.write_text(script.read_text().replace(sys.executable, str(fake)))
    process = subprocess.Popen(["bash", script], env={**os.environ, "SLURM_ARRAY_TASK_ID": "0"})
    log = tmp_path / "python.log"
    while not log.exists():
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 130
    words, saved = log.read_text().splitlines()
    assert words == f"-m megaswitch study run {path} --only 0"
    assert saved == "saved"


def write_metrics(study, values):
    for job in study.jobs:
        job.folder.mkdir(parents=True)
        lines = [{"step": job.config.train.steps, "valid/loss": values(job)}]
        (job.folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))


def test_a_report_fits_the_law_that_was_planted(write):
    study = load_study(
        write("""
[axes.experts]
model.moe.num_experts = [1, 2, 4, 8]
model.moe.group_size = [64, 64, 64, 64]
[axes.seed]
train.seed = [1, 2]
[report]
measures = ["valid/loss"]
fit = "experts"
""")
    )

    def law(job):
        shift = 1.004 if job.labels["seed"] == "1" else 1 / 1.004
        return 4.0 * int(job.labels["experts"]) ** -0.05 * shift

    write_metrics(study, law)
    made = make_report(study)
    (fit,) = made.fits
    assert fit.law.b == pytest.approx(0.05, abs=1e-9)
    assert fit.law.b_interval[0] < 0.05 < fit.law.b_interval[1]
    text = markdown(made)
    assert "| 2 | 2 of 2 | 3.864 ± 0.022 |" in text
    assert "valid/loss = 4 · x^-0.0500" in text


def test_cases_are_compared_with_a_baseline_seed_by_seed(write):
    study = load_study(
        write("""
[axes.size.small]
model.d_ff = 32
[axes.size.large]
model.d_ff = 64
[axes.rate]
optim.learning_rate = [0.1, 0.2]
[axes.seed]
train.seed = [1, 2, 3]
[report]
measures = ["valid/loss"]
baseline = { size = "small" }
""")
    )
    gains = {("0.1", "1"): 0.25, ("0.1", "2"): 0.5, ("0.1", "3"): 0.75}

    def loss(job):
        gain = gains.get((job.labels["rate"], job.labels["seed"]), 0.0)
        large = job.labels["size"] == "large"
        return 10.0 * int(job.labels["seed"]) - large * gain

    write_metrics(study, loss)
    (study.jobs[-1].folder / "metrics.jsonl").unlink()  # large, 0.2, seed 3
    made = make_report(study)
    (key,) = made.rows[2].values.keys() - made.rows[0].values.keys()
    assert key == "valid/loss - small"
    assert [row.values.get(key) for row in made.rows] == [
        *(None, None), [-0.25, -0.5, -0.75], [0.0, 0.0],
    ]  # fmt: skip
    text = markdown(made)
    assert "| size | rate | runs | valid/loss | valid/loss - small |" in text
    assert "| large | 0.1 | 3 of 3 | 19.500 ± 9.750 | -0.5000 ± 0.2500 |" in text
    assert "| small | 0.1 | 3 of 3 | 20.000 ± 10.000 | – |" in text


def test_runs_that_are_missing_are_named(write):
    study = load_study(write("[axes.seed]\ntrain.seed = [1, 2, 3]\n"))
    with pytest.raises(UserError, match=r"no run of .* has logged anything"):
        make_report(study)
    job = study.jobs[1]
    job.folder.mkdir(parents=True)
    (job.folder / "metrics.jsonl").write_text('{"step": 2, "valid/loss": 3.0}\n')
    made = make_report(study)
    assert made.notes == ["3 of 3 runs are not finished: seed=1; seed=2; seed=3"]
    assert "| 0 of 3 | 3.000 |" in markdown(made)


def test_jobs_beyond_a_stop_are_not_started(write, monkeypatch):
    study = load_study(write("[axes.seed]\ntrain.seed = [1, 2, 3]\n"))

    def sleeper(words, log, jobs):
        return subprocess.Popen(["sleep", "30"], start_new_session=True)

    monkeypatch.setattr(run_study, "_start", sleeper)
    said = []

    def say(text):
        said.append(text)
        os.kill(os.getpid(), signal.SIGINT)

    outcomes = run_jobs(study, study.jobs, at_once=2, say=say)
    assert [outcome.status for outcome in outcomes] == ["stopped"] * 3
    assert len(said) <= 3
