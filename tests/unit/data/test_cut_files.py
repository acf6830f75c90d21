"""Files cut while they are open are errors, whoever reads and however the signal is handled."""

import subprocess
import sys
from textwrap import dedent

import pytest

# Two documents: many pages of tokens, and an index of several pages.
PREPARE = """
import os, signal, sys, threading
import numpy as np
from megaswitch.data.indexed import IndexedWriter, TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.log import UserError
prefix = sys.argv[1]
with IndexedWriter(prefix, "<u2") as writer:
    for start in range(0, 60_000, 60):
        writer.add_document(3 + np.arange(start, start + 60) % 100)
store = TokenStore(prefix)
def refused(read, *arguments):
    try:
        read(*arguments)
    except UserError as error:
        return str(error)
    raise SystemExit("was not refused")
"""


def run(prefix, code: str) -> subprocess.CompletedProcess:
    # faulthandler is off: where no handler is there before, ours stands alone.
    program = dedent(PREPARE) + dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", program, str(prefix)], capture_output=True, text=True, timeout=250
    )
    return done


def passes(prefix, code: str) -> None:
    done = run(prefix, code + '\nprint("went through")')
    assert (done.returncode, done.stdout) == (0, "went through\n"), done.stderr


CUT_BIN = 'os.truncate(prefix + ".bin", 8192)\n'
READS_TOKENS = """
message = refused(store.tokens, 50_000, 1000)
assert "had 120000 bytes when it was opened and now has 8192" in message, message
"""


def test_every_way_to_the_tokens_meets_the_cut(tmp_path):
    passes(tmp_path / "c", f"""
loader = SpanCorruptionLoader(prefix, seed=0, vocab_size=256, encoder_length=64, shuffle=False)
{CUT_BIN}
{READS_TOKENS}
for read in (lambda: loader.batch(range(800, 810)), lambda: loader.batch([0]),
             lambda: store.tokens(4090, 20), lambda: store.tokens(0, 10),
             lambda: store.document(999), lambda: store.document(0)):
    assert "now has 8192" in refused(read)
os.truncate(prefix + ".bin", 0)
assert "now has 0" in refused(store.tokens, 0, 1)
""")  # fmt: skip


@pytest.mark.parametrize("size", [0, 30, 4096, 15_000])
def test_every_way_to_the_index_meets_the_cut(tmp_path, size):
    passes(tmp_path / "c", f"""
os.truncate(prefix + ".idx", {size})
for read in (lambda: store.document(0), lambda: store.document(999),
             lambda: store.document_lengths(0, 1000), lambda: store.sequence_lengths(0, 1000),
             lambda: store.document_starts(0, 1001), lambda: store.span(10, 20)):
    assert "had 20042 bytes when it was opened and now has {size}" in refused(read)
""")  # fmt: skip


def test_a_file_that_was_put_back_is_read_on(tmp_path):
    passes(
        tmp_path / "c",
        f"""
whole = open(prefix + ".bin", "rb").read()
{CUT_BIN}{READS_TOKENS}
with open(prefix + ".bin", "r+b") as file:
    file.write(whole)
assert store.tokens(59_999, 1) == 3 + 59_999 % 100
""",
    )


def test_a_file_cut_and_regrown_all_the_time_never_kills_threads(tmp_path):
    passes(tmp_path / "c", """
loader = SpanCorruptionLoader(prefix, seed=0, vocab_size=256, encoder_length=64)
whole = open(prefix + ".bin", "rb").read()
stop, seen = threading.Event(), []
def read():
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))  # as worker threads may
    good = bad = 0
    while not (stop.is_set() and good and bad):
        try:
            loader.batch(range(64))
            good += 1
        except UserError as error:
            assert "c.bin'" in str(error)
            bad += 1
    seen.append((good, bad))
threads = [threading.Thread(target=read) for _ in range(3)]
for thread in threads:
    thread.start()
# Goes on until every thread has met both.
for turn in range(1 << 20):
    os.truncate(prefix + ".bin", 4096 * (turn % 28))
    with open(prefix + ".bin", "r+b") as file:
        file.write(whole)
    if turn == 300:
        stop.set()
    if len(seen) == 3:
        break
for thread in threads:
    thread.join()
assert len(seen) == 3
""")  # fmt: skip


FAULT_OF_ANOTHER = """
import mmap
with open(prefix + ".else", "wb") as file:
    file.truncate(8192)
foreign = mmap.mmap(os.open(prefix + ".else", os.O_RDONLY), 8192, prot=mmap.PROT_READ)
os.truncate(prefix + ".else", 0)
"""


@pytest.mark.parametrize("fault", ["foreign[5000]", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_bus_errors_of_others_still_end_the_process(tmp_path, fault):
    done = run(tmp_path / "c", f"""
{CUT_BIN}{READS_TOKENS}{FAULT_OF_ANOTHER}
print("alive", flush=True)
{fault}
""")  # fmt: skip
    assert (done.returncode, done.stdout) == (-7, "alive\n"), done.stderr


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fault", ["foreign[5000]", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_fault_handlers_still_report_bus_errors_of_others(tmp_path, when, fault):
    # Set before ours it is called by ours; set after, it replaces ours until the next read.
    enable = "import faulthandler; faulthandler.enable()\n"
    first, second = (enable, "") if when == "before" else ("", enable)
    done = run(tmp_path / "c", f"""
{first}
store = TokenStore(prefix)
{second}
{CUT_BIN}{READS_TOKENS}{READS_TOKENS}{FAULT_OF_ANOTHER}
print("alive", flush=True)
{fault}
""")  # fmt: skip
    assert (done.returncode, done.stdout) == (-7, "alive\n"), done.stderr
    assert "Fatal Python error: Bus error" in done.stderr


def test_handlers_set_in_python_still_run(tmp_path):
    passes(
        tmp_path / "c",
        f"""
called = []
signal.signal(signal.SIGBUS, lambda *_: called.append("before"))
{CUT_BIN}{READS_TOKENS}
os.kill(os.getpid(), signal.SIGBUS)
assert called == ["before"]
signal.signal(signal.SIGBUS, lambda *_: called.append("after"))
{READS_TOKENS}
os.kill(os.getpid(), signal.SIGBUS)
assert called == ["before", "after"]
signal.signal(signal.SIGBUS, signal.SIG_IGN)
{READS_TOKENS}
os.kill(os.getpid(), signal.SIGBUS)
""",
    )
