"""Shards against indices of the whole tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexa.sharding import Shard, shard_of


@st.composite
def shards(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    dim = draw(st.integers(0, len(shape) - 1))
    start, stop = sorted(draw(st.tuples(*[st.integers(0, shape[dim])] * 2)))
    return Shard(shape, dim, start, stop)


def _part(shard: Shard) -> torch.Tensor:
    """Index in the flattened whole of each element of the part."""
    keep = torch.arange(shard.start, shard.stop)
    return torch.arange(math.prod(shard.shape)).view(shard.shape).index_select(shard.dim, keep)


@given(shards())
def test_the_part_is_a_view_with_the_shape_it_says(shard):
    whole = torch.arange(math.prod(shard.shape)).view(shard.shape)
    assert torch.equal(shard.take(whole), _part(shard))
    assert shard.take(whole).shape == shard.local_shape == _part(shard).shape
    assert shard.numel == _part(shard).numel()
    assert shard.is_whole == (shard.numel == whole.numel())
    if shard.numel:
        shard.take(whole)[...] = -1
        assert (whole == -1).sum() == shard.numel, "a view, not a copy"


@given(shards(), st.data())
def test_runs_are_the_elements_in_order_without_holes(shard, data):
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, shard.numel)] * 2)))
    runs = list(shard.runs(start, stop))
    assert len(runs) <= 3
    found, at = [], start
    for run in runs:
        assert run.offset == at
        assert run.width > 0
        assert run.rows > 0
        at += run.rows * run.width
        for row in range(run.rows):
            found += range(run.start + row * run.stride, run.start + row * run.stride + run.width)
    assert at == stop
    assert found == _part(shard).flatten()[start:stop].tolist()


@given(shards())
def test_a_whole_is_one_run(shard):
    whole = Shard.whole(shard.shape)
    assert whole.is_whole
    assert [(run.start, run.rows * run.width) for run in whole.runs(0, whole.numel)] == [(0, whole.numel)]


@pytest.mark.parametrize("numbers", [(1, 0, 2), (-1, 0, 2), (0, -1, 2), (0, 3, 2), (0, 0, 5)])
def test_no_shard(numbers):
    with pytest.raises(ValueError, match="no shard"):
        Shard((4,), *numbers)


def test_shard_of_a_parameter():
    parameter = torch.nn.Parameter(torch.zeros(3, 2))
    assert shard_of(parameter) == Shard.whole((3, 2))
    parameter.nexa_shard = Shard((6, 2), 0, 3, 6)
    assert shard_of(parameter) == Shard((6, 2), 0, 3, 6)
    partitioned = torch.nn.Parameter(torch.zeros(0))
    partitioned.ds_shape = torch.Size((5, 2))
    assert shard_of(partitioned) == Shard.whole((5, 2))
