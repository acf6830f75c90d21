"""Full disks, kills and other writers: a destination appears whole or not at all."""

from __future__ import annotations

import collections
import subprocess
import sys
from pathlib import Path

import pytest

from megaswitch.checkpoint import chunks
from megaswitch.checkpoint.conversion import Options
from megaswitch.checkpoint.huggingface_files import export_hf, import_hf
from megaswitch.checkpoint.manager import checkpoints
from megaswitch.log import UserError
from megaswitch.storage import location, publishing
from tests.unit.model.hf_reference import switch


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    """A sound source."""
    folder = tmp_path_factory.mktemp("sound") / "hf"
    switch().save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("place", ["local", "memory"])
def test_a_full_disk_leaves_what_was_there(place, hf, tmp_path, monkeypatch):
    base = tmp_path if place == "local" else location(f"memory://full-{tmp_path.name}")
    import_hf(hf, base / "old", Options())
    old = {p.name: p.read_bytes() for p in (base / "old").iterdir()}
    real = chunks.writing
    written = []

    def full(path):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(chunks, "writing", full)
    for run, source in ((import_hf, hf), (export_hf, base / "old")):
        written.clear()
        with pytest.raises(UserError, match=r"No space left on device. Nothing of it is left"):
            run(source, base / "new", Options(shard_bytes=10_000))
    assert [p.name for p in base.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in (base / "old").iterdir()} == old


def test_too_small_a_disk_is_seen_before_anything_is_written(hf, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")(1, 1, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"its disk has 0\.00 GB free"):
        import_hf(hf, tmp_path / "ours", Options())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["local", "memory"])
def test_what_a_kill_left_does_not_load_and_is_written_anew(place, hf, tmp_path):
    base = tmp_path if place == "local" else location(f"memory://killed-{tmp_path.name}")
    new = base / "ours"
    kept = {}

    def interrupted():
        with publishing(new) as folder:
            for name in ("shard-00001-of-00009.safetensors", "config.toml"):
                (folder / name).write_bytes(b"half")
            kept.update({path.name: path.read_bytes() for path in folder.iterdir()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not new.exists()
    # As a kill leaves it, which cleans nothing up.
    left = base / "ours.unfinished" if place == "local" else new
    left.mkdir(parents=True)
    for name, content in kept.items():
        (left / name).write_bytes(content)
    with pytest.raises(UserError, match="neither a checkpoint nor a run"):
        export_hf(new, base / "out", Options())
    import_hf(hf, new, Options())
    assert {p.name for p in new.iterdir()} == {
        "config.toml", "state.json", "shard-00001-of-00001.safetensors"
    }  # fmt: skip
    assert not (base / "ours.unfinished").exists()


def test_nothing_is_overwritten(hf, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("ours", "link"):
        with pytest.raises(UserError, match="exists already"):
            import_hf(hf, tmp_path / name, Options())


def test_two_writers_of_one_destination_do_not_mix(hf, tmp_path):
    with publishing(tmp_path / "ours") as folder:
        (folder / "x").write_bytes(b"")
        with pytest.raises(UserError, match="another process is writing"):
            import_hf(hf, tmp_path / "ours", Options())
        assert (folder / "x").exists()


def test_a_killed_command_leaves_no_checkpoint(hf, tmp_path):
    """The process dies in the middle of its third file, as by kill -9."""
    script = """
import os, sys
from megaswitch.checkpoint import chunks
real, count = chunks.writing, []
def dying(path):
    count.append(path)
    if len(count) == 3:
        os._exit(9)
    return real(path)
chunks.writing = dying
from megaswitch.cli import main
main()
"""
    destination = tmp_path / "checkpoints" / "step_00000000"
    arguments = ["convert", "import-hf", hf, destination, "--shard-size", "10KB"]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert killed.returncode == 9
    assert [p.name for p in destination.parent.iterdir()] == ["step_00000000.unfinished"]
    assert not checkpoints(destination.parent)
    import_hf(hf, destination, Options())
    assert checkpoints(destination.parent) == [destination]
    assert [p.name for p in destination.parent.iterdir()] == ["step_00000000"]
