"""Buffers that belong to a checkpoint: shapes, marks, precision."""

from __future__ import annotations

import copy

import torch

from nexa.model.layers import Features
from nexa.model.statistics import WithStatistics
from nexa.sharding import Shard, shard_of


class Example(WithStatistics):
    def __init__(self) -> None:
        super().__init__()
        shared = Features(10, 4, 7)
        self.weight = shared.vector(1.0)
        self.count = self.statistic("count", 3.0)
        self.squares = self.statistic("squares", 0.1, shared)
        self.window = self.statistic("window", 0.0, shared, rows=2)


def test_shapes_and_shards() -> None:
    example = Example()
    assert {name: tuple(b.shape) for name, b in example.named_buffers()} == {
        "count": (1,),
        "squares": (3,),
        "window": (2, 3),
    }
    assert list(example.state_dict()) == ["weight", "count", "squares", "window"]
    expected = {
        "count": Shard.whole((1,)),
        "squares": Shard((10,), 0, 4, 7),
        "window": Shard((2, 10), 1, 4, 7),
    }
    for move in (
        lambda m: m,
        lambda m: m.bfloat16(),
        lambda m: m.to("meta"),
        lambda m: m.double(),
        copy.deepcopy,
        lambda m: torch.nn.Sequential(m).half()[0],
    ):
        moved = move(Example())
        assert {name: shard_of(b) for name, b in moved.named_buffers()} == expected


def test_statistics_do_not_lose_precision() -> None:
    with torch.no_grad():
        example = Example()
        example.squares.fill_(0.1)
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        moved = copy.deepcopy(example).to(dtype)
        assert moved.weight.dtype == dtype
        assert moved.squares.dtype == kept
        assert torch.equal(moved.squares.float(), torch.full((3,), 0.1))


def test_half_precision_as_the_default_makes_no_half_statistics() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert {b.dtype for b in Example().buffers()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)
