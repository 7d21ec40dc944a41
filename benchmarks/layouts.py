"""Speed of one training step in every layout: ZeRO stages and tensor parallelism on two processes, against PyTorch's
DistributedDataParallel and against one process.

    python -m benchmarks.layouts [--shape 34m] [--precision bf16] [--only DDP "ZeRO 1" ...] [--out layouts.json]

The global batch is the same for all, and so are model, initial weights, AdamW and clipping (benchmarks/step.py). On a
CPU two processes have half of the threads each. DDP's loop is the decoder compiled as ours, with fp32 masters on every
rank; it sums gradients in bf16, and a second time in fp32, as nexa's engine does. Contestants stay alive and take
turns; the median counts. The loss of the last step, over the whole batch, must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.master_adamw import LR, MasterAdamW
from benchmarks.peer_turns import orders, take_turns
from benchmarks.peers import Turn, turns
from benchmarks.shapes import SHAPES, default_shape
from benchmarks.step import DTYPES, Setting, Step
from nexa.config.schema import ParallelConfig
from nexa.hardware import keep_freed_memory
from nexa.parallel.engine import Engine
from nexa.parallel.topology import Topology, connect

DDP, DDP_WIDE = "DDP", "DDP, fp32 sums"


@dataclass(frozen=True)
class Layout:
    """Processes, and how nexa's engine is to use them."""

    processes: int
    zero_stage: int = 0
    tensor: int = 1
    sequence: bool = False

    @property
    def parallel(self) -> ParallelConfig:
        """As a configuration has it."""
        return ParallelConfig(**{key: value for key, value in asdict(self).items() if key != "processes"})


LAYOUTS = {
    "one process": Layout(1),
    DDP: Layout(2),
    DDP_WIDE: Layout(2),
    "ZeRO 0": Layout(2, 0),
    "ZeRO 1": Layout(2, 1),
    "ZeRO 2": Layout(2, 2),
    "ZeRO 3": Layout(2, 3),
    "TP 2": Layout(2, 0, 2),
    "TP 2, sequence": Layout(2, 0, 2, True),
}


def ddp(setting: Setting, topology: Topology, wide: bool) -> Step:
    """A plain loop around DistributedDataParallel. wide: gradients are summed in fp32, as nexa sums them."""
    model = setting.decoder().to(setting.device, setting.dtype)
    model.compile_parts()
    wrapped = DistributedDataParallel(model, process_group=topology.data_group)
    if wide:
        # DDP reads names and annotations, and not as text
        wrapped.register_comm_hook(topology.data_group, lambda group, bucket: _mean_in_fp32(group, bucket))
    optimizer = MasterAdamW(list(model.parameters()))

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        loss = wrapped(ids, labels)
        (loss * (topology.data_size / setting.shape.tokens)).backward()  # DDP takes the mean over ranks
        optimizer.step()
        return loss.detach()

    return step


def _mean_in_fp32(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    gradient = bucket.buffer()
    total = gradient.float() / dist.get_world_size(group)
    work = dist.all_reduce(total, group=group, async_op=True)
    return work.get_future().then(lambda _: total.to(gradient.dtype))


def engine(setting: Setting, layout: Layout, micro_batch: int, topology: Topology) -> Step:
    """What train.py runs."""
    cfg = setting.config(layout.parallel, micro_batch)
    ours = Engine(cfg, topology)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        rows = ours.forward_backward({"input_ids": ids, "labels": labels}, float(setting.shape.tokens))
        ours.step(LR)
        return rows.sum()

    return step


def worker(name: str, shape: str, precision: str) -> None:
    """One rank of a contestant. Rank 0 hears the orders and tells the other."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries talk
    layout = LAYOUTS[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(SHAPES[shape], precision, device)
    micro_batch = setting.shape.batch * layout.tensor // layout.processes
    topology = connect(setting.config(layout.parallel, micro_batch))
    setting = Setting(setting.shape, precision, topology.device)
    if device.type == "cpu":
        keep_freed_memory()
    if name in {DDP, DDP_WIDE}:
        step = ddp(setting, topology, name == DDP_WIDE)
    else:
        step = engine(setting, layout, micro_batch, topology)
    mine = slice(topology.data_rank * micro_batch, (topology.data_rank + 1) * micro_batch)
    job = {"vocab": setting.shape.model.vocab_size, "rows": setting.shape.batch, "length": setting.shape.length}

    def shared(ids: Tensor, labels: Tensor) -> Tensor:
        loss = step(ids[mine], labels[mine]) / setting.shape.tokens
        dist.all_reduce(loss, group=topology.data_group)
        return loss

    with open(os.devnull, "w", encoding="ascii") as nowhere:
        out = answers if topology.rank == 0 else nowhere
        take_turns(job, topology.device, shared, _agreed(topology), out)


def _agreed(topology: Topology) -> Iterator[int]:
    """Rank 0's orders, on every rank."""
    heard = orders() if topology.rank == 0 else iter(())
    while True:
        count = torch.tensor(next(heard, 0), device=topology.device)
        dist.broadcast(count, 0)
        if not int(count):
            return
        yield int(count)


def start(name: str, shape: str, precision: str) -> Turn:
    """The processes of a contestant."""
    layout = LAYOUTS[name]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    threads = max(1, torch.get_num_threads() // layout.processes)
    command = [sys.executable, "-m", "benchmarks.layouts", "--worker", name, "--shape", shape, "--precision", precision]
    common = {"WORLD_SIZE": layout.processes, "LOCAL_WORLD_SIZE": layout.processes, "OMP_NUM_THREADS": threads}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def environment(rank: int) -> dict[str, str]:
        own = {**common, "RANK": rank, "LOCAL_RANK": rank}
        return {**os.environ, **{key: str(value) for key, value in own.items()}}

    for rank in range(1, layout.processes):
        subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment(rank))
    return turns(command, name, environment(0))


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: 34m on a CPU, 1b on a GPU")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--only", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first measured one, compilation too")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--worker", choices=LAYOUTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    shape = arguments.shape or default_shape("cuda" if cuda else "cpu")
    if arguments.worker:
        worker(arguments.worker, shape, arguments.precision)
        return
    contestants, losses = {}, {}
    for name in arguments.only:
        contestants[name] = start(name, shape, arguments.precision)
        contestants[name](arguments.warmup)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, turn in contestants.items():
            taken, losses[name] = turn(arguments.steps)
            seconds[name] += taken
    against = DDP if DDP in seconds else next(iter(seconds))
    base = statistics.median(seconds[against])
    device = torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine()
    print(
        f"{device}, {torch.get_num_threads()} threads in all, torch {torch.__version__}, {arguments.precision}, {shape}"
    )
    print(f"{'':16}{'ms/step':>9}{'fastest':>9}{'tokens/s':>10}{'ratio':>8}{'loss':>9}   (to {against})")
    results = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        speed = SHAPES[shape].tokens / median
        results[name] = {"step_seconds": median, "fastest_step_seconds": min(times), "ratio": median / base}
        print(
            f"{name:16}{median * 1e3:9.1f}{min(times) * 1e3:9.1f}{speed:10,.0f}{median / base:8.3f}{losses[name]:9.4f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
