"""The set of digests against Python's own."""

import hashlib
import random
import sys

from stages.prepare.digests import DigestSet


def digest(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def test_it_is_a_set() -> None:
    """Grown several times over; every second digest is met again, at any time later."""
    ours, pythons = DigestSet(), set()
    draw = random.Random(0)
    for _ in range(20_000):
        one = digest(draw.randrange(10_000))
        assert (one in ours) == (one in pythons)
        assert ours.add(one) == (one not in pythons)
        pythons.add(one)
        assert len(ours) == len(pythons)
    assert all(one in ours for one in pythons)
    assert not any(digest(number) in ours for number in range(10_000, 20_000))


def test_digests_that_begin_alike_are_told_apart() -> None:
    """They want the same place, the last one of the table: the search goes on at its beginning."""
    ours = DigestSet()
    alike = [b"\xff" * 8 + bytes([i]) * 24 for i in range(100)]
    assert all(ours.add(one) for one in alike)
    assert all(one in ours for one in alike)
    assert not any(ours.add(one) for one in alike)
    assert b"\xff" * 8 + bytes([100]) * 24 not in ours


def test_it_takes_less_than_half_of_what_pythons_own_takes() -> None:
    ours, pythons = DigestSet(), set()
    for number in range(30_000):
        ours.add(digest(number))
        pythons.add(digest(number))
    of_python = sys.getsizeof(pythons) + sum(map(sys.getsizeof, pythons))
    assert 2 * sys.getsizeof(ours._table) < of_python
