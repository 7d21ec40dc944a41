"""A few steps of the real engine, started by torchrun in tests: prints a JSON record from rank 0."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from nexa.config.build import from_mapping
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect


def main() -> None:
    job = json.loads(sys.argv[1])
    cfg = from_mapping(job["config"])
    topology = connect(cfg)
    model = Decoder(cfg.model, cfg.norm)
    initialise(model, cfg.model, cfg.norm, cfg.train.seed)
    engine = Engine(model, cfg, topology)
    generator = torch.Generator().manual_seed(7)
    batch, length, micro = cfg.train.global_batch_size, cfg.data.sequence_length, cfg.train.micro_batch_size
    losses, norms = [], []
    for _ in range(job["steps"]):
        rows = torch.randint(0, cfg.model.vocab_size, (batch, length + 1), generator=generator)
        labels = rows[:, 1:].clone()
        labels[torch.rand(labels.shape, generator=generator) < job.get("ignore", 0.0)] = -100
        scored = int((labels >= 0).sum())
        total = torch.zeros(())
        for index in range(engine.accumulation):
            first = (index * topology.data_size + topology.data_rank) * micro
            window = slice(first, first + micro)
            total += engine.forward_backward({"input_ids": rows[window, :-1], "labels": labels[window]}, scored)
        dist.all_reduce(total)
        losses.append(total.item() / scored)
        norms.append(float(engine.step(job["lr"]).grad_norm))
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in engine.module.named_parameters()}
    weights = {name: torch.zeros(size) for name, size in sizes.items()}
    for fragment in engine.fragments():
        weights[fragment.name][fragment.start : fragment.stop] = fragment.tensors["weight"]
    for full in weights.values():
        if engine.stage > 0:
            dist.all_reduce(full)
    if topology.is_main:
        save_file({name: w.clone() for name, w in weights.items()}, job["out"] + ".safetensors")
        with open(job["out"], "w") as file:
            json.dump({"losses": losses, "norms": norms}, file)
    disconnect()


if __name__ == "__main__":
    main()
