"""What measuring inside the network costs: `diagnose.batches=1` against one training step of the same global batch.

    python benchmarks/diagnose.py +exp=quickstart
    python benchmarks/diagnose.py +exp=lns_130m train.global_batch_size=4 train.micro_batch_size=2 train.precision=fp32

Steps and measurements take turns, on random tokens; the least of five turns (whatever else runs only adds), of CPU
time on a CPU and of the clock on a GPU. "forward" is the evaluation pass alone.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from nexa.config import compose
from nexa.diagnostics import DURING_TRAINING, measure
from nexa.parallel.diagnosis import sharing_of
from nexa.parallel.engine import Engine
from nexa.parallel.topology import connect, disconnect

ROUNDS = 5


def main(arguments: list[str]) -> None:
    """Print a line of JSON: seconds of a step, and what share of it a forward pass and all measures take."""
    cfg = compose([*arguments, "log.sample_tokens=0"])
    topology = connect(cfg)
    engine = Engine(cfg, topology)
    shape = cfg.train.micro_batch_size, cfg.data.sequence_length
    ids = torch.randint(0, cfg.model.vocab_size, shape, device=engine.device)
    batches = [{"input_ids": ids, "labels": ids}] * engine.accumulation
    scored = float(ids.numel() * engine.accumulation)
    sharing = sharing_of(topology, cfg.parallel.sequence)

    def seconds(work: Callable[[], object]) -> float:
        on_gpu = engine.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        if on_gpu:
            torch.cuda.synchronize()
        begin = clock()
        work()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - begin

    def step() -> None:
        for batch in batches:
            engine.forward_backward(batch, scored)
        engine.step(1e-4)

    def diagnose(*names: str) -> Callable[[], object]:
        return lambda: measure(engine.module, batches, names, sharing=sharing, forward=engine.total_loss)

    works = {"step": step, "forward": diagnose(), "diagnose": diagnose(*DURING_TRAINING)}
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(ROUNDS + 1):
        for name, work in works.items():
            spent = seconds(work)
            if turn > 0:  # the first turn warms up
                taken[name].append(spent)
    least = {name: min(values) for name, values in taken.items()}
    shares = {name: round(value / least["step"], 3) for name, value in least.items() if name != "step"}
    print(json.dumps({"step_seconds": round(least["step"], 3), "share_of_a_step": shares}))
    disconnect()


if __name__ == "__main__":
    main(sys.argv[1:])
