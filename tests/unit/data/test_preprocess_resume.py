"""A run that is killed goes on where it was, and its files are those of one without a break."""

import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megaswitch.data import spool as spool_module
from megaswitch.data.indexed import IndexedWriter, TokenStore
from megaswitch.data.preprocess import preprocess
from megaswitch.data.spool import Spool
from megaswitch.log import UserError

NAMES = ("a.jsonl", "b.jsonl.gz", "c.txt.xz", "d.parquet", "e.jsonl")


class Killed(BaseException):
    """What stands for a kill: nothing in the package catches it."""


@pytest.fixture
def inputs(tmp_path, make_text):
    texts = make_text(100)
    lines = ["nonsense" if n % 13 == 5 else json.dumps({"text": t}) for n, t in enumerate(texts)]
    (tmp_path / NAMES[0]).write_text("\n".join(lines[:20]))
    (tmp_path / NAMES[1]).write_bytes(gzip.compress("\n".join(lines[20:40]).encode()))
    (tmp_path / NAMES[2]).write_bytes(lzma.compress("\n\n".join(texts[40:60]).encode()))
    pq.write_table(pa.table({"text": texts[60:80]}), tmp_path / NAMES[3])
    (tmp_path / NAMES[4]).write_text("\n".join(lines[80:]))
    return [tmp_path / name for name in NAMES]


@pytest.fixture
def small(monkeypatch):
    """Small blocks, each of them saved."""
    monkeypatch.setattr("megaswitch.data.blocks._BLOCK_BYTES", 600)
    monkeypatch.setattr("megaswitch.data.compression._CHUNK_BYTES", 300)
    monkeypatch.setattr(spool_module, "_SAVE_SECONDS", 0.0)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(inputs, folder, tokenizer, **options):
    options = {"valid_fraction": 0.1, "seed": 3, **options}
    report = preprocess(inputs, folder / "c", tokenizer.path, **options)
    return files_of(folder), report.inputs, report.rejections


def stop_at_call(monkeypatch, target, name, number):
    """Kill the run in a call of a method, counted from 1, before it does anything."""
    original, calls = getattr(target, name), []

    def method(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(target, name, method)


def leave_as_killed(monkeypatch):
    """What is cleared up on the way out of an exception is not when a process is killed."""
    monkeypatch.setattr(IndexedWriter, "_discard", lambda self: None)
    monkeypatch.setattr(spool_module.shutil, "rmtree", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("target", "name", "number"),
    [
        *((Spool, "add", number) for number in (1, 2, 5, 9, 14)),
        *((Spool, "_save_if_due", number) for number in (1, 2, 6, 12)),
        (Spool, "finish", 1),
        (Spool, "rejections", 1),
        (IndexedWriter, "extend", 1),
        (IndexedWriter, "finish", 1),
        (IndexedWriter, "finish", 2),
        (IndexedWriter, "_publish", 1),
        (IndexedWriter, "_publish", 2),
        (Spool, "publish_rejections", 1),
    ],
)
def test_a_run_goes_on_after_a_stop_anywhere(
    inputs, tmp_path, tokenizer, small, monkeypatch, target, name, number
):
    expected = run(inputs, tmp_path / "whole", tokenizer)
    assert len(expected[0]) == 7
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        stop_at_call(patch, target, name, number)
        leave_as_killed(patch)
        with pytest.raises(Killed):
            run(inputs, folder, tokenizer)
    for part in ("train", "valid"):  # a corpus with an index is whole
        if (folder / f"c_{part}.idx").exists():
            assert files_of(folder)[f"c_{part}.bin"] == expected[0][f"c_{part}.bin"]
    assert run(inputs, folder, tokenizer) == expected
    assert not (folder / "c.spool").exists()


def killed_late(inputs, folder, tokenizer, monkeypatch, calls=10, **options):
    with monkeypatch.context() as patch:
        stop_at_call(patch, Spool, "add", calls)
        with pytest.raises(Killed):
            run(inputs, folder, tokenizer, **options)
    assert (folder / "c.spool" / "state.json").exists()


def test_what_is_done_is_not_done_again(inputs, tmp_path, tokenizer, small, monkeypatch, capsys):
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch)
    assert "the same command goes on from there" in capsys.readouterr().err
    added = []
    add = Spool.add
    monkeypatch.setattr(Spool, "add", lambda self, block: (added.append(1), add(self, block)))
    run(inputs, tmp_path / "cut", tokenizer)
    resumed = len(added)
    assert "going on from" in capsys.readouterr().err
    run(inputs, tmp_path / "whole", tokenizer)
    assert resumed == len(added) - resumed - 9


@pytest.mark.parametrize(
    "options", [{"append_eos": False}, {"num_extra_ids": 50}, {"text_field": "body"}]
)
def test_tokens_made_otherwise_are_not_used(
    inputs, tmp_path, tokenizer, small, monkeypatch, capsys, options
):
    if "text_field" in options:
        inputs = [inputs[0], inputs[2]]
        inputs[0].write_text("".join('{"text": "ba", "body": "da"}\n' for _ in range(200)))
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch, calls=4)
    capsys.readouterr()
    assert run(inputs, tmp_path / "cut", tokenizer, **options) == run(
        inputs, tmp_path / "whole", tokenizer, **options
    )
    assert "going on" not in capsys.readouterr().err


def test_another_seed_uses_the_same_tokens(inputs, tmp_path, tokenizer, small, monkeypatch, capsys):
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch)
    found = run(inputs, tmp_path / "cut", tokenizer, seed=9, valid_fraction=0.0)
    assert "going on from" in capsys.readouterr().err
    assert found == run(inputs, tmp_path / "whole", tokenizer, seed=9, valid_fraction=0.0)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_changed_input_and_all_behind_it_are_read_again(
    inputs, tmp_path, tokenizer, small, monkeypatch, changed
):
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch)
    content = {
        0: b'{"text": "bada kilo"}\n',
        1: gzip.compress(b'{"text": "bada kilo"}\n'),
        2: lzma.compress(b"bada kilo"),
    }
    inputs[changed].write_bytes(content[changed])
    assert run(inputs, tmp_path / "cut", tokenizer) == run(inputs, tmp_path / "whole", tokenizer)


def test_other_inputs_are_recognised(inputs, tmp_path, tokenizer, small, monkeypatch):
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch)
    for others in (inputs[1:], inputs[:1], inputs[::-1]):
        shutil.copytree(tmp_path / "cut", tmp_path / "again")
        found = run(others, tmp_path / "again", tokenizer)
        assert found == run(others, tmp_path / "whole", tokenizer)
        shutil.rmtree(tmp_path / "again")
        shutil.rmtree(tmp_path / "whole")


def damage(folder, kind):
    state = folder / "state.json"
    if kind == "short tokens":
        os.truncate(folder / "tokens", 10)
    elif kind == "no ends":
        (folder / "ends").unlink()
    elif kind == "half a state":
        state.write_bytes(state.read_bytes()[:-40])
    else:
        values = json.loads(state.read_text())
        values["inputs"][0].update({"negative": {"tokens": -5}, "text": {"tokens": "5"}}[kind])
        state.write_text(json.dumps(values))


@pytest.mark.parametrize("kind", ["short tokens", "no ends", "half a state", "negative", "text"])
def test_a_damaged_folder_is_not_used(inputs, tmp_path, tokenizer, small, monkeypatch, kind):
    killed_late(inputs, tmp_path / "cut", tokenizer, monkeypatch)
    damage(tmp_path / "cut" / "c.spool", kind)
    assert run(inputs, tmp_path / "cut", tokenizer) == run(inputs, tmp_path / "whole", tokenizer)


def test_two_at_a_time_are_refused(inputs, tmp_path, tokenizer, monkeypatch):
    add = Spool.add

    def add_and_start_another(self, block):
        monkeypatch.setattr(Spool, "add", add)
        with pytest.raises(UserError, match=r"is preprocessing in .* another output prefix"):
            run(inputs, tmp_path, tokenizer)
        add(self, block)

    monkeypatch.setattr(Spool, "add", add_and_start_another)
    run(inputs, tmp_path, tokenizer)


COMMAND = """
import sys
from megaswitch.data import blocks, encode_files, spool
blocks._BLOCK_BYTES, spool._SAVE_SECONDS, encode_files._INLINE_BLOCKS = 20_000, 0.02, 2
from megaswitch.cli import main
main()
"""


@pytest.mark.long
def test_twenty_kills_of_the_command(tmp_path, make_text, tokenizer):
    """SIGKILL at random moments; between them nothing half done passes for a corpus."""
    inputs = []
    for number in range(6):
        lines = [json.dumps({"text": text}) for text in make_text(6000, seed=number)]
        lines[number::50] = ["nonsense"] * len(lines[number::50])
        inputs.append(tmp_path / f"{number}.jsonl.gz")
        inputs[-1].write_bytes(gzip.compress("\n".join(lines).encode(), 1))

    def command(folder):
        return [
            sys.executable, "-c", COMMAND, "preprocess", *map(str, inputs), "--workers", "2",
            "--tokenizer", str(tokenizer.path), "--output", str(folder / "c"),
            "--valid-fraction", "0.1",
        ]  # fmt: skip

    started = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, stderr=subprocess.DEVNULL)
    usual = time.monotonic() - started
    expected = files_of(tmp_path / "whole")
    draw = random.Random(0)
    kills = resumed = 0
    sessions = set()
    while kills < 20:
        folder = tmp_path / f"cut{kills}"
        while True:
            with (tmp_path / "log").open("w+") as log:
                process = subprocess.Popen(command(folder), stderr=log, start_new_session=True)
                sessions.add(process.pid)
                try:
                    code = process.wait(draw.uniform(0.2, 1.2) * usual if kills < 20 else None)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    code = process.wait()
                    kills += 1
                log.seek(0)
                resumed += "going on from" in log.read()
            for part in ("train", "valid"):
                if (folder / f"c_{part}.idx").exists():
                    TokenStore(folder / f"c_{part}")
                    assert files_of(folder)[f"c_{part}.bin"] == expected[f"c_{part}.bin"]
            if code == 0:
                break
            assert code == -signal.SIGKILL
        assert files_of(folder) == expected
    assert resumed > 5
    for _ in range(100):  # workers end with their parent
        if not alive_in(sessions):
            return
        time.sleep(0.1)
    raise AssertionError("workers outlive their parent")


def alive_in(sessions):
    """Processes, zombies aside, of these sessions."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if os.getsid(int(entry.name)) in sessions and (entry / "cmdline").read_bytes():
                found.append(entry)
    return found
