from collections import Counter

import pytest

from megaswitch import native
from megaswitch.data.philox import Random, Stream, philox4x32

# The known answers of Random123 1.14 (kat_vectors, philox4x32 10 rounds).
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected
    assert tuple(native.philox4x32(counter, key)) == expected


def test_a_stream_reads_the_blocks_in_order():
    random = Random(seed=5 << 32 | 7, index=11 << 32 | 13, stream=Stream.EPOCH_OFFSET)
    words = [random.next() for _ in range(8)]
    assert words == [w for block in (0, 1) for w in philox4x32((13, 11, 1, block), (7, 5))]


def test_seeds_and_indices_do_not_share_numbers():
    streams = {
        tuple(Random(seed, index, stream).next() for _ in range(1))
        for seed in range(20)
        for index in range(20)
        for stream in Stream
    }
    assert len(streams) == 20 * 20 * len(Stream)


@pytest.mark.parametrize("bound", [1, 2, 3, 7, 10])
def test_bounded_draws_are_uniform(bound):
    random = Random(1, 2, Stream.SPANS)
    counts = Counter(random.below(bound) for _ in range(4000))
    assert set(counts) == set(range(bound))
    deviation = sum((n - 4000 / bound) ** 2 / (4000 / bound) for n in counts.values())
    assert deviation < 40  # chi-square with at most 9 degrees of freedom: far beyond 1e-5


def test_bounded_draws_reject_the_short_rest():
    # With a bound just above 2^31 nearly every second word is rejected; without rejection the
    # lower half of the results would be twice as likely as the upper.
    bound = (1 << 31) + 1
    random = Random(3, 4, Stream.SPANS)
    draws = [random.below(bound) for _ in range(2000)]
    assert max(draws) < bound
    assert 900 < sum(draw < bound // 2 for draw in draws) < 1100
