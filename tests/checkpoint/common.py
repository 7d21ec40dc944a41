"""A small reference model, arbitrary cuts of it, and worlds of processes."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from nexa.checkpoint.fragment import Fragment
from nexa.sharding import Shard

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (61, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 21),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.embed_scale": (1,),
    "lm_head.weight": (61, 8),
}
Whole = dict[str, dict[str, torch.Tensor]]


def whole(seed: int, states: tuple[str, ...] = ("weight", "exp_avg", "exp_avg_sq")) -> Whole:
    """{parameter: {state: full tensor}} of random fp32 values."""
    generator = torch.Generator().manual_seed(seed)
    return {name: {s: torch.randn(shape, generator=generator) for s in states} for name, shape in SHAPES.items()}


def shard_at(shape: tuple[int, ...], tensor: int, at: int, rng: random.Random) -> Shard:
    """Part `at` of `tensor` parts of a matrix along a random dimension, whole for a vector.

    Parts are equal but for a shorter last one (61 rows: 31 + 30), or of any size, none included; a quarter of the time
    neighbours hold the same part, as key-value heads that are fewer than the ranks.
    """
    if tensor == 1 or len(shape) < 2:
        return Shard.whole(shape)
    dim, kind = rng.randrange(2), rng.randrange(4)
    if kind == 0:
        tensor, at = tensor // 2, at // 2
    size, step = shape[dim], -(-shape[dim] // tensor)
    edges = [min(size, step * part) for part in range(tensor + 1)]
    if kind == 1:
        edges = [0, *sorted(rng.randint(0, size) for _ in range(tensor - 1)), size]
    return Shard(shape, dim, edges[at], edges[at + 1])


def cut(model: Whole, rank: int, world: int, seed: int, tensor: int = 1) -> list[Fragment]:
    """Rank's fragments under random cuts, the same on every rank; for seed < 0 every rank owns all of its shards.

    Consecutive ranks are `tensor`-parallel; those with the same place in that group cut the same shards.
    """
    fragments = []
    for index, (name, tensors) in enumerate(model.items()):
        shape = tuple(tensors["weight"].shape)
        rng = random.Random(seed * 1000 + index)
        place, data, data_size = rank % tensor, rank // tensor, world // tensor
        shard = shard_at(shape, tensor, place, rng)
        rng = random.Random(f"{seed} {index} {shard}")
        edges = [0, *sorted(rng.randint(0, shard.numel) for _ in range(data_size - 1)), shard.numel]
        at = rng.sample(range(data_size), data_size).index(data)
        start, stop = (0, shard.numel) if seed < 0 else (edges[at], edges[at + 1])
        flat = {state: shard.take(full).reshape(-1)[start:stop].clone() for state, full in tensors.items()}
        fragments.append(Fragment(name, shard, start, stop, flat, {"step": 3.0 + index}))
    return fragments


def blank(model: Whole, rank: int, world: int, seed: int, tensor: int = 1) -> list[Fragment]:
    """Like `cut`, filled with NaN."""
    fragments = cut(model, rank, world, seed, tensor)
    for fragment in fragments:
        for tensor in fragment.tensors.values():
            tensor.fill_(math.nan)
    return fragments


def assert_filled(fragments: list[Fragment], model: Whole) -> None:
    """Every fragment has the reference's bits."""
    for fragment in fragments:
        for state, tensor in fragment.tensors.items():
            part = fragment.shard.take(model[fragment.name][state])
            expected = part.reshape(-1)[fragment.start : fragment.stop]
            assert torch.equal(tensor, expected), (fragment.name, state)


def _start(rank: int, world: int, store: str, target: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=30)
        )
        target(rank, world, *args)
        torch.distributed.barrier()
    except BaseException:
        Path(f"{store}.error{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def run_world(world: int, target: Callable[..., None], *args: object) -> None:
    """`target(rank, world, *args)` in `world` processes of one gloo group; fails when one of them does."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "nexa.checkpoint.save", "nexa.checkpoint.load"])
    with tempfile.TemporaryDirectory() as directory:
        store = f"{directory}/store"
        processes = [context.Process(target=_start, args=(r, world, store, target, args)) for r in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            if process.is_alive():
                process.kill()
        errors = [path.read_text() for path in sorted(Path(directory).glob("store.error*"))]
        assert not errors, "\n".join(errors)
        assert [process.exitcode for process in processes] == [0] * world
