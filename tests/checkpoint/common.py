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

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (37, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 21),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.embed_scale": (1,),
    "lm_head.weight": (37, 8),
}
Whole = dict[str, dict[str, torch.Tensor]]


def whole(seed: int, states: tuple[str, ...] = ("weight", "exp_avg", "exp_avg_sq")) -> Whole:
    """{parameter: {state: full tensor}} of random fp32 values."""
    generator = torch.Generator().manual_seed(seed)
    return {name: {s: torch.randn(shape, generator=generator) for s in states} for name, shape in SHAPES.items()}


def cut(model: Whole, rank: int, world: int, seed: int) -> list[Fragment]:
    """Rank's fragments under random cuts, the same on every rank; for seed < 0 every rank owns everything."""
    fragments = []
    for index, (name, tensors) in enumerate(model.items()):
        shape = tuple(tensors["weight"].shape)
        numel = math.prod(shape)
        rng = random.Random(seed * 1000 + index)
        edges = [0, *sorted(rng.randint(0, numel) for _ in range(world - 1)), numel]
        owners = rng.sample(range(world), world)
        at = owners.index(rank)
        start, stop = (0, numel) if seed < 0 else (edges[at], edges[at + 1])
        flat = {state: tensor.reshape(-1)[start:stop].clone() for state, tensor in tensors.items()}
        fragments.append(Fragment(name, shape, start, stop, flat, {"step": 3.0 + index}))
    return fragments


def blank(model: Whole, rank: int, world: int, seed: int) -> list[Fragment]:
    """Like `cut`, filled with NaN."""
    fragments = cut(model, rank, world, seed)
    for fragment in fragments:
        for tensor in fragment.tensors.values():
            tensor.fill_(math.nan)
    return fragments


def assert_filled(fragments: list[Fragment], model: Whole) -> None:
    """Every fragment has the reference's bits."""
    for fragment in fragments:
        for state, tensor in fragment.tensors.items():
            expected = model[fragment.name][state].reshape(-1)[fragment.start : fragment.stop]
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
