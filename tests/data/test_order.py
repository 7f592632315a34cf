from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.data.order import Interleave, permute

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@pytest.mark.parametrize("size", [*range(1, 70), 997, 1024])
def test_every_small_shuffle_is_a_bijection(size):
    for key in range(3):
        assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


@given(size=st.integers(2, 10**13), key=st.integers(0, 2**40), data=st.data())
def test_large_shuffles_stay_in_range_and_apart(size, key, data):
    first, second = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=2))
    shuffled = permute(first, size, key), permute(second, size, key)
    assert all(0 <= index < size for index in shuffled)
    assert (shuffled[0] == shuffled[1]) == (first == second)


def test_keys_decide_the_shuffle():
    orders = {tuple(permute(i, 50, *key) for i in range(50)) for key in [(0,), (1,), (0, 1)]}
    assert len(orders) == 3


def test_a_shuffle_moves_neighbours_apart():
    size = 10_000
    order = [permute(index, size, "key") for index in range(size)]
    steps = [abs(b - a) for a, b in pairwise(order)]
    assert abs(sum(steps) / len(steps) - size / 3) < size / 50  # of a uniform shuffle: size / 3


@given(weights=WEIGHTS)
def test_each_stream_is_read_in_order_without_gaps(weights):
    mixture = Interleave(weights)
    seen: Counter[int] = Counter()
    for row in range(500):
        stream, index = mixture.locate(row)
        assert index == seen[stream]
        seen[stream] += 1


@given(weights=WEIGHTS, rows=st.integers(0, 2000))
def test_shares_match_the_weights_over_any_prefix(weights, rows):
    mixture = Interleave(weights)
    counts = Counter(mixture.locate(row)[0] for row in range(rows))
    for stream, weight in enumerate(weights):
        assert abs(counts[stream] - rows * weight / sum(weights)) <= len(weights)


def test_far_rows_are_located_exactly():
    mixture = Interleave([0.7, 0.2, 0.1])
    start = 10**13
    indices: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for row in range(start, start + 200):
        stream, index = mixture.locate(row)
        indices[stream].append(index)
    for stream, weight in enumerate([0.7, 0.2, 0.1]):
        first = indices[stream][0]
        assert indices[stream] == list(range(first, first + len(indices[stream])))
        assert first / start == pytest.approx(weight)
