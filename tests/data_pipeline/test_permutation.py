import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.permutation import TABLE_LIMIT, Permutation, derive_key

KEYS = st.integers(0, 2**64 - 1)


@given(st.integers(1, 20000), KEYS)
@settings(max_examples=80, deadline=None)
def test_is_a_bijection(size, key):
    image = Permutation(size, key)(np.arange(size))
    np.testing.assert_array_equal(np.sort(image), np.arange(size))


@pytest.mark.parametrize("size", [10**6 + 3, 10**9, 10**12, 2**40 + 1, 2**59 + 12345])
def test_large_sizes_stay_inside_and_injective(size):
    indices = np.unique(np.random.default_rng(1).integers(0, size, 200_000))
    image = Permutation(size, 5)(indices)
    assert image.min() >= 0
    assert image.max() < size
    assert len(np.unique(image)) == len(indices)


def test_scalar_shape_and_range():
    permutation = Permutation(5000, 3)
    assert int(permutation(17)) == int(permutation(np.array([17]))[0])
    assert permutation(np.zeros((2, 3), np.int64)).shape == (2, 3)
    for wrong in (-1, 5000):
        with pytest.raises(IndexError):
            permutation(wrong)


@pytest.mark.parametrize("size", [3, 7, TABLE_LIMIT + 1, 4001])
def test_first_item_goes_everywhere(size):
    """Over keys, an item's image is uniform: chi-square within six standard deviations."""
    draws = 400 * 10
    bins = min(size, 10)
    images = np.array([int(Permutation(size, derive_key(k))(size // 2)) for k in range(draws)])
    edges = (np.arange(bins + 1) * size) // bins
    counts = np.histogram(images, edges)[0]
    expected = draws * np.diff(edges) / size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < (bins - 1) + 6 * np.sqrt(2 * (bins - 1))


def test_all_orders_of_small_sizes_occur():
    orders = {tuple(Permutation(4, derive_key("x", k))(np.arange(4)).tolist()) for k in range(600)}
    assert len(orders) == 24


@pytest.mark.parametrize("size", [500, 100_003])
def test_looks_random(size):
    """Neither fixed points nor neighbours nor order survive; both halves are mixed."""
    image = Permutation(size, derive_key(0, 1, "s", 2))(np.arange(size))
    assert (image == np.arange(size)).sum() < 12
    assert (np.abs(np.diff(image)) == 1).sum() < 20
    correlation = np.corrcoef(np.arange(size), image)[0, 1]
    assert abs(correlation) < 5 / np.sqrt(size)
    low = (image[: size // 2] < size // 2).mean()
    assert abs(low - 0.5) < 5 / np.sqrt(size)


def test_keys_depend_on_every_part():
    parts = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1), (0, 0, "a\x1f", 0)]
    assert len({derive_key(*p) for p in parts}) == len(parts)
    a, b = (Permutation(10**6, derive_key(0, 0, "a", epoch))(np.arange(1000)) for epoch in (0, 1))
    assert (a == b).sum() < 5


def plain_mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
    return x ^ (x >> 31)


def plain_permutation(size, key, index):
    """The same network in Python integers."""
    golden = 0x9E3779B97F4A7C15
    columns = next(c for c in range(math.isqrt(size), size + 1) if c * c >= size)
    rows = (size + columns - 1) // columns
    keys = [plain_mix((key + i * golden) % 2**64) for i in range(1, 9)]
    while True:
        left, right = divmod(index, columns)
        for i in range(0, 8, 2):
            left = (left + plain_mix((right * golden + keys[i]) % 2**64) % rows) % rows
            right = (right + plain_mix((left * golden + keys[i + 1]) % 2**64) % columns) % columns
        index = left * columns + right
        if index < size:
            return index


@given(st.integers(TABLE_LIMIT + 1, 2**50), KEYS, st.integers(0, 2**60))
@settings(max_examples=60, deadline=None)
def test_against_plain_integers(size, key, draw):
    assert int(Permutation(size, key)(draw % size)) == plain_permutation(size, key, draw % size)


def test_golden_order():
    """The order of training data: a change here changes every run that is resumed."""
    assert derive_key(0, 0, "s", 0) == 8751454779146439471
    assert Permutation(10, 42)(np.arange(10)).tolist() == [2, 0, 7, 5, 9, 3, 6, 1, 8, 4]
    assert Permutation(10**6, 42)(np.arange(4)).tolist() == [214094, 413762, 634083, 528104]
