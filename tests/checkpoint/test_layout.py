"""The plan: every element once, shares bounded, replicas from the writer's own memory."""

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.layout import describe, file_names, make_plan
from nexa.sharding import Shard

from .common import cut, whole


@st.composite
def worlds(draw):
    """(world size, descriptions): every shard of every parameter is held in overlapping, uneven, empty ranges."""
    world = draw(st.integers(1, 5))
    ranks = [[] for _ in range(world)]
    for index in range(draw(st.integers(1, 6))):
        shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
        dim = draw(st.integers(0, len(shape) - 1))
        parts = draw(st.integers(1, min(world, shape[dim])))
        inner = draw(st.permutations(range(1, shape[dim])))[: parts - 1]
        for part, (low, high) in enumerate(itertools.pairwise([0, *sorted(inner), shape[dim]])):
            numel = math.prod(shape) // shape[dim] * (high - low)
            owners = range(part, world, parts)
            edges = sorted(draw(st.lists(st.integers(0, numel), min_size=len(owners) - 1, max_size=len(owners) - 1)))
            for rank, (start, stop) in zip(owners, itertools.pairwise([0, *edges, numel]), strict=True):
                # Some own more than others, so that a piece may begin inside an owner's range.
                held = [draw(st.integers(0, start)), draw(st.integers(stop, numel))]
                states = {"weight": "F32", "exp_avg": "F32"} if held[0] < held[1] else {}
                ranks[rank].append([f"p{index}", shape, [dim, low, high], held, states])
    return world, ranks


@given(worlds())
@settings(max_examples=150, deadline=None)
def test_pieces_tile_and_shares_are_bounded(case):
    world, ranks = case
    plan = make_plan(ranks)
    loads = [0] * world
    for one in plan.values():
        seen = np.zeros(one.shape, dtype=int)
        for shard, pieces in one.shards.items():
            elements = np.arange(one.numel).reshape(one.shape).take(range(shard.start, shard.stop), shard.dim).ravel()
            for piece in pieces:
                seen.ravel()[elements[piece.start : piece.stop]] += 1
                _, shape, cut_at, (start, stop), _ = next(f for f in ranks[piece.rank] if f[0] == one.name)
                assert shard in (Shard(tuple(shape), *cut_at), Shard.whole(tuple(shape)))
                assert start <= piece.start < piece.stop <= stop
                # The offset must point at the same elements in the owner's memory.
                assert piece.offset == piece.start - start
        assert (seen == 1).all()
        assert one.states == {"weight": "F32", "exp_avg": "F32"}
        loads[one.writer] += one.nbytes
    largest = max(one.nbytes for one in plan.values())
    assert max(loads) <= sum(loads) / world + largest


def test_replicas_are_written_from_own_memory_by_all_ranks():
    plan = make_plan([describe(cut(whole(0), rank, 3, -1)) for rank in range(3)])
    pieces = [(one, piece) for one in plan.values() for held in one.shards.values() for piece in held]
    assert all(piece.rank == one.writer for one, piece in pieces)
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


def _described(*rows):
    """One rank each: (dim, from, to) of p [4, 6] and the range held of that shard."""
    return [[["p", [4, 6], list(shard), list(held), {"weight": "F32"}]] for shard, held in rows]


def test_a_gap_and_a_disagreement_are_named():
    with pytest.raises(ValueError, match=r"p: element 4 of Shard\(shape=\(4, 6\), .* belongs to no rank"):
        make_plan(_described(((0, 0, 4), (0, 4)), ((0, 0, 4), (5, 24))))
    with pytest.raises(ValueError, match=r"p \[4, 6\]: from index 5 of dimension 1 on"):
        make_plan(_described(((1, 0, 2), (0, 8)), ((1, 2, 5), (0, 12)), ((1, 5, 6), (2, 2))))
    for other in ((1, 3, 6), (1, 1, 6), (0, 2, 4), (1, 0, 6)):
        with pytest.raises(ValueError, match=r"p \[4, 6\]: shards .* do not tile it"):
            make_plan(_described(((1, 0, 2), (0, 8)), (other, (0, Shard((4, 6), *other).numel))))
    with pytest.raises(ValueError, match="belongs to no rank"):
        make_plan(_described(((0, 0, 4), (2, 2))))
    one, other = _described(((0, 0, 4), (0, 24)), ((0, 0, 6), (0, 24)))
    other[0][1] = [6, 4]
    with pytest.raises(ValueError, match="p: rank 1 has"):
        make_plan([one, other])
    with pytest.raises(ValueError, match="two fragments of one parameter"):
        describe(cut(whole(0), 0, 1, 0) * 2)


def test_a_whole_parameter_is_one_shard_however_it_is_marked():
    plan = make_plan(_described(((1, 0, 6), (0, 10)), ((0, 0, 4), (10, 24))))
    assert [(s.is_whole, len(pieces)) for s, pieces in plan["p"].shards.items()] == [(True, 2)]


def test_fragment_checks_its_numbers():
    shard = Shard((2, 3), 1, 0, 2)
    with pytest.raises(ValueError, match=r"p: \[2, 5\) is no range of Shard\(shape=\(2, 3\), dim=1, start=0, stop=2\)"):
        Fragment("p", shard, 2, 5, {}, {})
    with pytest.raises(ValueError, match=r"p: weight is \(4,\), not \(3,\)"):
        Fragment("p", shard, 0, 3, {"weight": torch.zeros(4)}, {})
    assert Fragment("p", shard, 1, 4, {}, {}).shape == (2, 3)


def test_a_7b_model_on_64_ranks_is_planned_in_seconds():
    """TP 8 x DP 8 under ZeRO 3: every rank holds an eighth of every shard."""
    d, f = 4096, 11008
    matrices = {"q": (d, d, 0), "k": (d, d, 0), "v": (d, d, 0), "o": (d, d, 1), "gate": (f, d, 0), "down": (d, f, 1)}
    shapes = {f"layers.{i}.{name}": given for i in range(32) for name, given in matrices.items()}
    descriptions = []
    for rank in range(64):
        place, data = rank % 8, rank // 8
        rows = []
        for name, (*shape, dim) in shapes.items():
            low, high = (shape[dim] * p // 8 for p in (place, place + 1))
            numel = math.prod(shape) // 8
            states = {"weight": "F32", "exp_avg": "F32", "exp_avg_sq": "F32"}
            rows.append([name, shape, [dim, low, high], [numel * data // 8, numel * (data + 1) // 8], states])
        descriptions.append(rows)
    begin = time.process_time()
    plan = make_plan(descriptions)
    assert time.process_time() - begin < 2
    assert sum(len(pieces) for one in plan.values() for pieces in one.shards.values()) == 64 * len(shapes)
    assert len(json.dumps(descriptions)) < 200 * 64 * len(shapes), "no rows in a description"
