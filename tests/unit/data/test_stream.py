import gc
import itertools
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from megaswitch import native
from megaswitch.data.indexed import TokenStore
from megaswitch.data.loader import SpanCorruptionLoader
from megaswitch.log import UserError

SETTINGS = {"seed": 7, "vocab_size": 1100, "encoder_length": 32}
RAW = 34  # tokens of a sample at encoder_length 32
FIELDS = ["encoder_tokens", "decoder_tokens", "decoder_targets", "encoder_mask", "decoder_mask"]


@pytest.fixture
def prefix(make_corpus):
    return make_corpus(10_000)


@pytest.fixture
def samples(prefix):
    return SpanCorruptionLoader(prefix, **SETTINGS)


def plan(size=4, start=0):
    """Batches without end."""
    return (range(i, i + size) for i in itertools.count(start, size))


def same(one, other):
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in [*FIELDS, "sample_index"])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("ahead", [1, 3, 16])
def test_batches_are_the_same_however_many_threads_make_them(samples, threads, ahead):
    with samples.stream(plan(), threads=threads, ahead=ahead) as stream:
        for number, batch in zip(range(300), stream, strict=False):
            assert same(batch, samples.batch(range(4 * number, 4 * number + 4)))


def test_batches_keep_while_later_ones_are_made(samples):
    with samples.stream(plan(), threads=2, ahead=4) as stream:
        kept = list(itertools.islice(stream, 50))
    for number, batch in enumerate(kept):
        assert same(batch, samples.batch(range(4 * number, 4 * number + 4)))


def test_a_plan_with_an_end_ends_the_stream(samples):
    sizes = [3, 1, 4, 1, 5]
    starts = np.cumsum([0, *sizes]).tolist()
    ranges = [range(a, b) for a, b in itertools.pairwise(starts)]
    with samples.stream(ranges, threads=2, ahead=3) as stream:
        assert [len(batch) for batch in stream] == sizes
        with pytest.raises(StopIteration):
            next(stream)


def test_no_more_batches_are_planned_than_may_be_ahead(samples):
    planned = []

    def counted():
        for batch in plan():
            planned.append(batch)
            yield batch

    with samples.stream(counted(), threads=3, ahead=5) as stream:
        assert len(planned) == 5
        next(stream)
        assert len(planned) == 6


def test_a_batch_that_fails_raises_when_it_is_its_turn_and_the_rest_can_be_had(prefix, monkeypatch):
    with prefix.with_name("corpus.bin").open("r+b") as file:
        file.seek(2 * 5_000)
        file.write(b"\xff\xff")
    monkeypatch.setattr("megaswitch.data.corpus_checks._ID_CHECK_BUDGET", 1)
    samples = SpanCorruptionLoader(prefix, **SETTINGS, shuffle=False)
    bad = 5_000 // RAW // 4
    with samples.stream(plan(), threads=3, ahead=8) as stream:
        for number in range(60):
            if number == bad:
                with pytest.raises(UserError, match=r"token 5000 of '.*corpus.bin' is id 65535"):
                    next(stream)
            else:
                rows = range(4 * number, 4 * number + 4)
                assert same(next(stream), samples.batch(rows))


def test_what_is_no_error_of_the_data_is_raised_as_it_is(samples):
    stream = samples.stream([range(-1, 3)], threads=1, ahead=1)
    with pytest.raises(ValueError, match="negative sample index"):
        next(stream)


def running_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("close", [True, False])
def test_a_stream_may_end_at_any_time(samples, close):
    before = running_threads()
    for taken in range(40):
        stream = samples.stream(plan(64), threads=3, ahead=12)
        for _ in range(taken % 5):
            next(stream)
        if close:
            stream.close()
            stream.close()
            with pytest.raises(StopIteration):
                next(stream)
        del stream
    gc.collect()
    assert running_threads() == before


def test_an_exception_on_the_way_leaves_no_thread(samples):
    before = running_threads()
    with suppress(KeyboardInterrupt), samples.stream(plan(64), threads=2, ahead=8) as stream:
        next(stream)
        raise KeyboardInterrupt
    assert running_threads() == before


def end_within(seconds):
    """End this process then, even if it waits in the core, where no handler of Python's runs."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def test_a_forked_child_is_refused_and_ends(samples):
    with samples.stream(plan(64), threads=2, ahead=8) as stream:
        next(stream)
        child = os.fork()
        if child == 0:
            end_within(60)
            code = 1
            try:
                next(stream)
            except UserError as error:
                code = 0 if "threads did not come along when that was forked" in str(error) else 2
                stream.close()
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert len(next(stream)) == 64


def test_a_forked_child_can_read_for_itself_whatever_the_threads_were_doing(make_corpus):
    """Locks that threads of the parent held at the fork stay locked in the child for good."""
    prefix = make_corpus(1_500_000)
    fresh = SpanCorruptionLoader(prefix, **SETTINGS)
    count = fresh.samples_per_epoch  # each batch makes the order of an epoch, under a lock
    epochs = (range(i * count, i * count + 4) for i in itertools.count(1))
    expected = SpanCorruptionLoader(prefix, **SETTINGS).batch(range(4))
    with fresh.stream(epochs, threads=3, ahead=16) as stream:
        for _ in range(8):
            next(stream)
            child = os.fork()
            if child == 0:
                end_within(30)
                code = 1
                try:
                    good = same(fresh.batch(range(4)), expected)
                    with fresh.stream(plan(), threads=2, ahead=3) as own:
                        good = good and same(next(own), expected)
                    code = 0 if good else 2
                finally:
                    os._exit(code)
            assert os.waitpid(child, 0)[1] == 0


def test_many_streams_at_once(samples):
    before = running_threads()
    expected = [samples.batch(range(4 * n, 4 * n + 4)) for n in range(12)]
    streams = [samples.stream(plan(), threads=2, ahead=1 + n % 5) for n in range(40)]
    try:
        for number in range(12):
            for stream in streams[number:]:
                assert same(next(stream), expected[number])
            streams[number].close()
    finally:
        for stream in streams:
            stream.close()
    assert running_threads() == before


def blocks(task, number):
    with open(f"/proc/self/task/{task}/status") as status:
        mask = next(line.split()[1] for line in status if line.startswith("SigBlk"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_signals_are_left_to_the_threads_of_python(samples):
    """A thread of the core that took SIGTERM would let the main thread sleep on."""
    others = set(os.listdir("/proc/self/task"))
    with samples.stream(plan(), threads=2, ahead=2):
        ours = set(os.listdir("/proc/self/task")) - others
        assert len(ours) == 2
        for task in ours:
            while blocks(task, signal.SIGBUS):  # so a thread is born, before it has its own mask
                time.sleep(0.01)
            assert blocks(task, signal.SIGTERM)
            assert blocks(task, signal.SIGINT)


def test_several_python_threads_have_streams_of_their_own(samples):
    results = {}

    def work(name):
        with samples.stream(plan(), threads=1, ahead=3) as stream:
            results[name] = list(itertools.islice(stream, 40))

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for batches in results.values():
        assert all(same(a, b) for a, b in zip(batches, results[0], strict=True))


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_pread_gives_the_samples_of_mmap(make_corpus, dtype):
    prefix = make_corpus(5_000, dtype=dtype)
    mapped = SpanCorruptionLoader(prefix, **SETTINGS)
    read = SpanCorruptionLoader(prefix, **SETTINGS, pread=True)
    assert read.fingerprint == mapped.fingerprint
    assert same(read.batch(range(500)), mapped.batch(range(500)))
    with read.stream(plan(), threads=3, ahead=6) as stream:
        for number, batch in zip(range(100), stream, strict=False):
            assert same(batch, mapped.batch(range(4 * number, 4 * number + 4)))


def test_with_pread_a_file_that_is_gone_is_an_error(prefix):
    store = TokenStore(prefix, pread=True)
    samples = SpanCorruptionLoader(prefix, **SETTINGS, pread=True)
    os.truncate(f"{prefix}.bin", 0)
    with pytest.raises(UserError, match=r"corpus\.bin' had 20000 bytes"):
        store.tokens(4_000, 10)
    with (
        samples.stream(plan(), threads=2, ahead=2) as stream,
        pytest.raises(UserError, match=r"corpus\.bin' had 20000 bytes"),
    ):
        next(stream)


def test_the_core_refuses_what_does_not_fit(samples):
    index = np.zeros(2, dtype=np.int64)
    good = [np.empty((2, width), dtype=np.int32) for width in (32, 8, 8)]
    loader = native.Loader(samples.sampler, threads=1, capacity=1)
    with pytest.raises(RuntimeError, match="no batch was submitted"):
        loader.next()
    with pytest.raises(ValueError, match="decoder_tokens has the wrong shape"):
        loader.submit(index, good[0], good[0], good[2])
    loader.submit(index, *good)
    with pytest.raises(RuntimeError, match="the loader is full"):
        loader.submit(index, *good)
    loader.next()
    assert np.array_equal(good[0], samples.batch([0, 0]).encoder_tokens.numpy())
    loader.close()
    with pytest.raises(ValueError, match="the loader is closed"):
        loader.next()
    with pytest.raises(ValueError, match="a loader needs a thread and room"):
        native.Loader(samples.sampler, threads=0, capacity=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sanitizer", "mode"), [("thread", []), ("address,undefined", []), ("address", ["fork"])]
)
def test_sanitizers_find_nothing_in_the_threads(make_corpus, tmp_path, sanitizer, mode):
    prefix = make_corpus(300_000, top=32_000)
    root = Path(__file__).parents[3]
    program = tmp_path / "stress"
    names = ("loader", "mixture", "indexed", "span_corruption", "bus_guard")
    sources = [root / f"csrc/{name}.cpp" for name in names]
    compiler = ["g++", "-std=c++17", "-g", "-O1", "-pthread", f"-fsanitize={sanitizer}"]
    compiler += ["-fno-sanitize-recover=all", f"-I{root / 'csrc'}"]
    stress = root / "tests/native/loader_stress.cpp"
    subprocess.run([*compiler, stress, *sources, "-o", program], check=True)
    # The thread sanitizer does not know the random layouts of memory of newer kernels.
    command = ["setarch", "-R", program, prefix, *mode]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout == "done\n"
