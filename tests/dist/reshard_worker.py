"""Trains on a packed store from a checkpoint or from scratch, perhaps saves; for `test_reshard`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nexa.checkpoint.save import CheckpointWriter
from nexa.config.build import from_mapping
from nexa.interop.huggingface import config_json
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect
from nexa.train.data import TrainingData
from nexa.train.resume import MODES, Origin, restore
from nexa.train.sources import open_sources
from nexa.train.state import RunState
from tests.dist.worker import serve, whole_tensors


def run(job: dict) -> dict:
    """Load, train, save, as the job says; losses, gradient norms and samples of each step."""
    cfg = from_mapping(job["config"])
    topology = connect(cfg)
    data = TrainingData(cfg, topology, open_sources(cfg, topology))
    engine = Engine(cfg, topology, initial=job["load"] is None)
    state = RunState()
    if job["load"] is not None:
        state = restore(engine, cfg, Origin(Path(job["load"]), MODES["continue"]), {})
    data.continue_from(state.step, state.samples)
    loaded = {key: whole_tensors(engine, key)[0] for key in ("exp_avg", "exp_avg_sq")}
    losses, norms, samples = [], [], []
    for step in range(state.step, state.step + job["steps"]):
        total = torch.zeros(())
        step_data = data.fetch(step)
        scored = data.scored_tokens(step_data, engine.device)
        for batch in step_data.micro_batches:
            total += engine.forward_backward(batch, scored).sum()
        dist.all_reduce(total, group=topology.data_group)
        losses.append(total.item() / float(scored))
        norms.append(float(engine.step(job["lr"]).grad_norm))
        samples.append(data.sample_ids(step))
    if job["save"] is not None:
        step = state.step + job["steps"]
        writer = CheckpointWriter(
            Path(job["save"]), rank=topology.rank, world_size=topology.world_size, group=topology.control_group
        )
        saved = RunState(step=step, samples=step * cfg.train.global_batch_size)
        kept = {"state": saved.to_dict(), "data": {}, "optim": {"lr": cfg.optim.lr}}
        writer.save(step, engine.fragments(), kept, config_json(cfg.model, cfg.norm, eos_token_id=None))
        writer.close()
        loaded = {key: whole_tensors(engine, key)[0] for key in ("exp_avg", "exp_avg_sq")}
    if topology.is_main:
        save_file({f"{key}/{name}": t for key, all_of in loaded.items() for name, t in all_of.items()}, job["moments"])
    return {"losses": losses, "norms": norms, "samples": samples}


if __name__ == "__main__":
    serve(run)
