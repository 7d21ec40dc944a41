"""A few steps of the real engine, started by torchrun in tests: writes a JSON record and the weights from rank 0."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nexa.config.build import from_mapping
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect
from nexa.train.reweight import row_factors


def whole_tensors(engine: Engine, state: str = "weight") -> tuple[dict[str, torch.Tensor], float]:
    """(every master weight, or every tensor of an optimizer state, whole, put together from what ranks own; the largest
    difference between two owners)."""
    # statistics of the model are weights without a state
    names = {name for name, _ in engine.module.named_parameters()} if state != "weight" else engine.parameter_shapes()
    low = {n: torch.full((math.prod(shape),), math.inf) for n, shape in engine.parameter_shapes().items() if n in names}
    high = {name: torch.full_like(value, -math.inf) for name, value in low.items()}
    for fragment in engine.fragments():
        if fragment.name not in low:
            continue
        for run in fragment.shard.runs(fragment.start, fragment.stop):
            begin = run.offset - fragment.start
            values = fragment.tensors[state][begin : begin + run.rows * run.width].view(run.rows, run.width)
            for whole in (low[fragment.name], high[fragment.name]):
                whole.as_strided((run.rows, run.width), (run.stride, 1), run.start).copy_(values)
    for name in low:
        dist.all_reduce(low[name], op=dist.ReduceOp.MIN)
        dist.all_reduce(high[name], op=dist.ReduceOp.MAX)
    return low, max(float((high[name] - low[name]).max()) for name in low)


def run(job: dict) -> dict:
    """Train as the job says; losses, gradient norms, and what the ranks disagree about."""
    cfg = from_mapping(job["config"])
    topology = connect(cfg)
    engine = Engine(cfg, topology)
    generator = torch.Generator().manual_seed(7)
    batch, length, micro = cfg.train.global_batch_size, cfg.data.sequence_length, cfg.train.micro_batch_size
    losses, norms = [], []
    measured = None
    for step in range(job["steps"]):
        rows = torch.randint(0, cfg.model.vocab_size, (batch, length + 1), generator=generator)
        labels = rows[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < job["ignore"]] = -100
        scored = int((labels >= 0).sum())
        total = torch.zeros(())
        firsts = [(i * topology.data_size + topology.data_rank) * micro for i in range(engine.accumulation)]
        windows = [slice(first, first + micro) for first in firsts]
        batches = [{"input_ids": rows[window, :-1], "labels": labels[window]} for window in windows]
        factors = [None] * len(batches)
        if cfg.reweight.apply:
            counts = torch.stack([(each["labels"] >= 0).sum(1).float() for each in batches])
            factors = row_factors(engine, batches, counts, cfg.reweight)
        if cfg.log.gradient_noise and step == job["steps"] - 1:
            engine.watch_micro_batches()
        for micro_batch, factor in zip(batches, factors, strict=True):
            total += engine.forward_backward(micro_batch, scored, factor).sum()
        dist.all_reduce(total, group=topology.data_group)
        losses.append(total.item() / scored)
        result = engine.step(job["lr"], measure=step == job["steps"] - 1)
        norms.append(float(result.grad_norm))
        measured = result.norms
        squares = result.micro_squares
    weights, divergence = whole_tensors(engine)
    if topology.is_main:
        save_file(weights, job["weights"])
    held = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    return {
        "losses": losses,
        "norms": norms,
        "divergence": divergence,
        "measured": measured,
        "held": held,
        "micro_squares": None if squares is None else float(squares),
    }


def serve(run: Callable[[dict], dict]) -> None:
    """argv[1]: JSON list of jobs; argv[2]: where rank 0 writes the list of their results."""
    with open(sys.argv[1]) as file:
        jobs = json.load(file)
    results = [run(job) for job in jobs]
    if dist.get_rank() == 0:
        with open(sys.argv[2], "w") as file:
            json.dump(results, file)
    disconnect()


if __name__ == "__main__":
    serve(run)
