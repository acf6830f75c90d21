"""What goes wrong is said in one paragraph, and leaves nothing behind."""

import errno
import signal
import subprocess
import sys

import click
import pytest

from megaswitch.cli import cli, main
from megaswitch.cli.common import explain
from megaswitch.data.indexed import companion
from megaswitch.log import UserError
from tests.unit.cli.commands import ENVIRONMENT, refusal, start

PATHS = {
    "tokenizer train": ("tokenizer", "train", "{}", "--output", "out.model"),
    "preprocess": ("preprocess", "{}", "--output", "out", "--tokenizer", "{model}"),
    "preprocess tokenizer": ("preprocess", "{texts}", "--output", "out", "--tokenizer", "{}"),
    "train": ("train", "{}"),
    "train data": ("train", "{config}", "--data.train={}"),
    "inspect": ("inspect", "{}"),
    "inspect tokenizer": ("inspect", "{data}", "--tokenizer", "{}"),
    "evaluate": ("evaluate", "{}", "{data}"),
    "evaluate data": ("evaluate", "{run}", "{}"),
    "generate": ("generate", "{}", "A <extra_id_0>."),
    "generate input": ("generate", "{run}", "--input", "{}"),
    "generate tokenizer": ("generate", "{run}", "A", "--tokenizer", "{}"),
}


@pytest.fixture
def words(text_run, tmp_path, monkeypatch):
    """A command line in an empty folder, with one path of one's own in it."""
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.toml"
    config.write_text("")
    known = {"model": text_run / "spm.model", "texts": text_run / "texts.jsonl", "config": config}
    known |= {"data": text_run / "valid", "run": text_run / "run"}
    return lambda name, path: [word.format(path, **known) for word in PATHS[name]]


@pytest.mark.parametrize("name", PATHS)
def test_a_missing_file_is_named(words, name, tmp_path):
    before = set(tmp_path.iterdir())
    assert "nowhere" in refusal(*words(name, tmp_path / "nowhere"))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", PATHS)
def test_an_empty_file_is_named_or_explained(words, name, tmp_path):
    (tmp_path / "empty").touch()
    message = refusal(*words(name, tmp_path / "empty"))
    assert "empty" in message or "hold no usable" in message or "is not set" in message
    assert not (tmp_path / "out.model").exists()
    assert not companion(tmp_path / "out", ".idx").exists()


@pytest.mark.parametrize("name", PATHS)
def test_a_folder_in_the_place_of_a_file_is_named(words, name, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "folder" in refusal(*words(name, tmp_path / "folder"))


@pytest.mark.parametrize("name", PATHS)
def test_noise_is_refused(words, name, tmp_path):
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00\n" * 100)
    message = refusal(*words(name, tmp_path / "noise"))
    assert "noise" in message or "hold no usable" in message


@pytest.mark.parametrize("command", ["inspect", "evaluate", "train"])
def test_a_truncated_index_is_named(command, text_run, tmp_path, words):
    for suffix in (".bin", ".idx", ".meta.json"):
        content = companion(text_run / "valid", suffix).read_bytes()
        companion(tmp_path / "cut", suffix).write_bytes(content)
    index = tmp_path / "cut.idx"
    index.write_bytes(index.read_bytes()[:-12])
    name = {"inspect": "inspect", "evaluate": "evaluate data", "train": "train data"}[command]
    assert "cut.idx" in refusal(*words(name, tmp_path / "cut"))


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("train", "--model.d_modle=3"), "did you mean model.d_model"),
        (("train", "--nonsense"), "--nonsense is not an override"),
        (("train", "--model.preset=switch-bas-8"), "did you mean switch-base-8"),
    ],
)
def test_unknown_keys_are_named(words, what, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("")
    command, *rest = words
    assert what in refusal(command, config, *rest)


@pytest.mark.parametrize("size", [10, 300, 359])
def test_a_vocabulary_that_cannot_be_is_explained(text_run, tmp_path, size):
    output = tmp_path / "out.model"
    words = ("tokenizer", "train", text_run / "texts.jsonl", "--output", output)
    assert str(size) in refusal(*words, "--vocab-size", size).replace(",", "")
    assert not output.exists()


def test_plots_need_matplotlib_before_any_work(text_run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    message = refusal("inspect", text_run / "run", "--plot", tmp_path / "a.png")
    assert "megaswitch[plot]" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["curves", "curves.docx"])
def test_a_plot_that_cannot_be_drawn_is_refused(text_run, tmp_path, name):
    with pytest.raises((UserError, ValueError)):
        cli.main(
            ["inspect", str(text_run / "run"), "--plot", str(tmp_path / name)],
            standalone_mode=False,
        )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "/a/b: Permission denied; cho",
        ),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: Is a directory; it is a fo"),
        (OSError(errno.ENOSPC, "No space left on device", b"/a"), "/a: No space left on device; f"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device, while this"),
        (OSError("strange"), "strange"),
        (UserError("x is 1; it must be 2"), "x is 1; it must be 2"),
    ],
)
def test_errors_of_the_system_name_the_file_and_a_remedy(error, expected):
    assert explain(error).startswith(expected)
    assert "Errno" not in explain(error)


@pytest.mark.parametrize(
    ("error", "rank", "code", "said"),
    [
        (UserError("wrong"), "0", 2, "error: wrong\n"),
        (UserError("wrong"), "3", 2, "error on rank 3: wrong\n"),
        (ImportError("no core"), "0", 2, "error: no core\n"),
        (KeyboardInterrupt(), "0", 130, "interrupted\n"),
        (KeyboardInterrupt(), "1", 130, ""),
        (click.exceptions.Exit(7), "0", 7, ""),
        (SystemExit(130), "0", 130, ""),
    ],
)
def test_how_commands_end(monkeypatch, capsys, error, rank, code, said):
    @click.command("break")
    def fail():
        raise error

    monkeypatch.setitem(cli.commands, "break", fail)
    monkeypatch.setattr(sys, "argv", ["megaswitch", "break"])
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == code
    assert capsys.readouterr().err.removeprefix("\n") == said


@pytest.mark.parametrize("words", [("train", "--keys"), ("--help",)])
def test_a_reader_that_leaves_is_no_error(words):
    process = start(*words)
    process.stdout.close()
    error = process.stderr.read()
    process.wait(60)
    assert error == ""


def test_a_full_disk_under_the_output_is_said():
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, "-m", "megaswitch", "completion", "fish"],
            stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, check=False,
        )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith("error: No space left on device")
    assert "Traceback" not in process.stderr


# A command that waits inside its work for as long as it takes to be interrupted.
BUSY = """
import signal, sys, time
from megaswitch.cli import main
import {module} as module
def wait(*_args, **_options):
    print("ready", flush=True)
    time.sleep(100)
module.{name} = wait
sys.argv = ["megaswitch", *{words}]
main()
"""


def interrupted(code) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
        # A suite that runs in the background inherits deafness to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    return process


@pytest.mark.parametrize(
    ("module", "name", "words"),
    [
        (
            "megaswitch.data.preprocess",
            "preprocess",
            ["preprocess", "a", "--output=b", "--tokenizer=c"],
        ),
        ("megaswitch.cli.inspect", "find_kind", ["inspect", "a"]),
        ("megaswitch.cli.doctor_checks", "check_everything", ["doctor"]),
    ],
)
def test_ctrl_c_ends_with_130(module, name, words):
    process = interrupted(BUSY.format(module=module, name=name, words=words))
    assert process.wait(60) == 130
    assert process.stderr.read().strip() == "interrupted"


def test_ctrl_c_ends_tokenizer_training_at_once():
    """Its C++ never looks, so the signal itself must end it; shells make 130 of that, too."""
    words = ["tokenizer", "train", "a", "--output=b"]
    module, name = "megaswitch.data.tokenizer", "train_tokenizer"
    process = interrupted(BUSY.format(module=module, name=name, words=words))
    assert process.wait(60) == -signal.SIGINT
    assert process.stderr.read() == ""
