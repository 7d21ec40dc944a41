"""Two compiled steps of the real engine at ZeRO stage 3, started by torchrun in tests: prints what Dynamo counted."""

from __future__ import annotations

import functools
import json

import torch
from torch._dynamo.utils import counters

from nexa.config.build import from_mapping
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect
from tests.dist.common import config


def main() -> None:
    """Graphs are not compiled any further: what breaks them up is the same, and it takes a second."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    cfg = from_mapping(config(train={"compile": True}, parallel={"zero_stage": 3}))
    topology = connect(cfg)
    engine = Engine(cfg, topology)
    rows = torch.randint(0, 61, (4, 13), generator=torch.Generator().manual_seed(topology.rank))
    for _ in range(2):
        engine.forward_backward({"input_ids": rows[:, :-1], "labels": rows[:, 1:].contiguous()}, 96.0)
        engine.step(1e-3)
    if topology.is_main:
        print(json.dumps({"breaks": counters["graph_break"], "graphs": counters["stats"]["unique_graphs"]}))
    disconnect()


if __name__ == "__main__":
    main()
