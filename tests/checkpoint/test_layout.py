"""The plan: every element once, shares bounded, replicas from the writer's own memory."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.layout import describe, file_names, make_plan

from .common import cut, whole


@st.composite
def worlds(draw):
    """(world size, descriptions) with overlapping, uneven and empty ranges that cover every parameter."""
    world = draw(st.integers(1, 5))
    ranks = [[] for _ in range(world)]
    for index in range(draw(st.integers(1, 6))):
        numel = draw(st.integers(1, 200))
        edges = sorted(draw(st.lists(st.integers(0, numel), max_size=4)))
        for low, high in itertools.pairwise([0, *edges, numel]):
            if low == high:
                continue
            for rank in draw(st.sets(st.integers(0, world - 1), min_size=1)):
                # One fragment may be several ranges, as a tensor-parallel slice is.
                mine = next((f for f in ranks[rank] if f[0] == f"p{index}"), None)
                if mine is None:
                    mine = [f"p{index}", [numel], [], {"weight": "F32", "exp_avg": "F32"}]
                    ranks[rank].append(mine)
                offset = sum(stop - start for start, stop, _ in mine[2])
                # Some own more than others, so that a piece may begin inside an owner's range.
                mine[2].append([low, draw(st.integers(high, numel)), offset])
    return world, ranks


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_pieces_tile_and_shares_are_bounded(case):
    world, ranks = case
    plan = make_plan(ranks)
    loads = [0] * world
    for one in plan.values():
        at = 0
        for piece in one.pieces:
            assert piece.start == at
            ranges = next(f[2] for f in ranks[piece.rank] if f[0] == one.name)
            # The offset must point at the same elements in the owner's memory.
            assert any(
                low <= piece.start and piece.stop <= high and piece.offset == offset + piece.start - low
                for low, high, offset in ranges
            )
            at = piece.stop
        assert at == one.numel
        loads[one.writer] += one.nbytes
    largest = max(one.nbytes for one in plan.values())
    assert max(loads) <= sum(loads) / world + largest


def test_replicas_are_written_from_own_memory_by_all_ranks():
    plan = make_plan([describe(cut(whole(0), rank, 3, -1)) for rank in range(3)])
    assert all(piece.rank == one.writer for one in plan.values() for piece in one.pieces)
    assert {one.writer for one in plan.values()} == {0, 1, 2}


def test_plan_is_the_same_whatever_the_order_of_fragments():
    described = [describe(cut(whole(0), rank, 3, 5)) for rank in range(3)]
    assert make_plan(described) == make_plan([list(reversed(d)) for d in described])


def test_file_names_are_those_of_hugging_face():
    one = make_plan([describe(cut(whole(0), 0, 1, 0))])
    assert file_names(one, 0) == {"model": "model.safetensors", "optimizer": "optimizer-00001-of-00001.safetensors"}
    two = make_plan([describe(cut(whole(0), rank, 2, 0)) for rank in range(2)])
    assert [file_names(two, rank)["model"] for rank in range(2)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_a_gap_and_a_disagreement_are_named():
    with pytest.raises(ValueError, match="p: element 4 of 6 belongs to no rank"):
        make_plan([[["p", [6], [[0, 4, 0]], {"weight": "F32"}]], [["p", [6], [[5, 6, 0]], {"weight": "F32"}]]])
    with pytest.raises(ValueError, match="p: rank 1"):
        make_plan([[["p", [6], [[0, 6, 0]], {"weight": "F32"}]], [["p", [3, 2], [[0, 6, 0]], {"weight": "F32"}]]])
    with pytest.raises(ValueError, match="two fragments of one parameter"):
        describe(cut(whole(0), 0, 1, 0) * 2)


def test_fragment_checks_its_numbers():
    with pytest.raises(ValueError, match="no range of shape"):
        Fragment("p", (2, 3), 4, 7, {}, {})
    with pytest.raises(ValueError, match=r"p: weight is \(4,\), not \(3,\)"):
        Fragment("p", (2, 3), 0, 3, {"weight": torch.zeros(4)}, {})
    assert Fragment("p", (2, 3), 2, 2, {"weight": torch.zeros(0)}, {}).ranges == ()
    assert math.prod(Fragment("p", (2, 3), 1, 5, {}, {}).shape) == 6
