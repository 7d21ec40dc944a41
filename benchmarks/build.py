"""Memory for building a model under ZeRO-3: peak growth of each rank's resident memory, against the size of the whole.

    torchrun --standalone --nproc-per-node=4 benchmarks/build.py +exp=pre_7b train.precision=bf16
    torchrun --standalone --nproc-per-node=4 benchmarks/build.py +exp=pre_350m --engine

Without `--engine` only the weights are built and partitioned; with it the optimizer's master weights as well.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import torch.distributed as dist

from nexa.config import compose
from nexa.model.decoder import parameter_count
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect


def peak_gib() -> float:
    """Largest resident memory of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: list[str]) -> None:
    """Build once and print a line of JSON from rank 0."""
    overrides = [word for word in arguments if word != "--engine"]
    cfg = compose([*overrides, "parallel.zero_stage=3", "train.device=cpu", "train.micro_batch_size=1"])
    topology = connect(cfg)
    Engine.prepare(topology)
    before, begin = peak_gib(), time.perf_counter()
    built = Engine(cfg, topology) if "--engine" in arguments else Engine.build(cfg, topology, initial=True)
    grown: list[float] = [0.0] * topology.world_size
    dist.all_gather_object(grown, peak_gib() - before)
    if topology.is_main:
        count = parameter_count(cfg.model, cfg.norm)
        width = 4 if cfg.train.precision == "fp32" else 2
        print(
            json.dumps(
                {
                    "parameters": count,
                    "whole_gib": round(count * width / 2**30, 3),
                    "peak_growth_gib": [round(value, 3) for value in grown],
                    "seconds": round(time.perf_counter() - begin, 1),
                }
            )
        )
    del built
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1:])
