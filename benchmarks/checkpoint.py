"""Time and memory of saving and loading a checkpoint of any size on a few ranks of one machine, without a model.

    python benchmarks/checkpoint.py [--experiment pre_1b] [--ranks 2] [--tensor 1] [--dir DIR] [--out FILE]

Each rank holds what ZeRO 1 gives it of fp32 weights and two moments. While saving, all its fragments are views of one
buffer as long as the longest of them, so that a rank takes the memory of the snapshot alone; in a run the live state
comes on top. Loading fills fragments of full size, from a cold page cache, and compares them with what was saved.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.load import find, load_fragments, verify
from nexa.checkpoint.save import CheckpointWriter
from nexa.sharding import Shard

STATES = ("weight", "exp_avg", "exp_avg_sq")
ROW_PARALLEL = ("o_proj.weight", "down_proj.weight")
GIB = 1 << 30
Shapes = dict[str, tuple[int, ...]]


def shapes_of(experiment: str) -> Shapes:
    """Shapes of an experiment's parameters by name; nothing is allocated."""
    from nexa.config import compose
    from nexa.model.decoder import Decoder

    cfg = compose([f"+exp={experiment}"])
    with torch.device("meta"):
        model = Decoder(cfg.model, cfg.norm)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def owned(shapes: Shapes, rank: int, ranks: int, tensor: int) -> list[tuple[str, Shard, int, int]]:
    """(name, shard, start, stop): this rank's `tensor`-th of each matrix and, of those end to end, its ZeRO share."""
    shards = []
    for name, shape in shapes.items():
        dim = 1 if name.endswith(ROW_PARALLEL) else 0
        low, high = (shape[dim] * place // tensor for place in (rank % tensor, rank % tensor + 1))
        shards.append((name, Shard(shape, dim, low, high) if len(shape) > 1 else Shard.whole(shape)))
    total = sum(shard.numel for _, shard in shards)
    first, last = (total * part // (ranks // tensor) for part in (rank // tensor, rank // tensor + 1))
    found, at = [], 0
    for name, shard in shards:
        start, stop = max(0, first - at), min(shard.numel, last - at)
        if start < stop:
            found.append((name, shard, start, stop))
        at += shard.numel
    return found


def stand_ins(shapes: Shapes, rank: int, ranks: int, tensor: int) -> list[Fragment]:
    """Fragments whose tensors are views of one buffer for each state."""
    parts = owned(shapes, rank, ranks, tensor)
    generator = torch.Generator().manual_seed(rank)
    buffers = {s: torch.rand(max(p[3] - p[2] for p in parts), generator=generator) for s in STATES}
    return [Fragment(*part, {s: buffers[s][: part[3] - part[2]] for s in STATES}, {"step": 1.0}) for part in parts]


def resident(key: str) -> float:
    """GiB of a line of /proc/self/status: VmRSS now, VmHWM at its peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024 / GIB


def timed(action: Callable[[], Any]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def saving(root: Path, shapes: Shapes, rank: int, ranks: int, tensor: int) -> dict[str, float]:
    """Two asynchronous saves: the first makes the plan and the snapshot's memory, the second finds them."""
    fragments = stand_ins(shapes, rank, ranks, tensor)
    found = {"resident_before_gib": resident("VmRSS")}
    writer = CheckpointWriter(root, rank=rank, world_size=ranks, keep_last=1)
    for step, label in ((1, "first"), (2, "second")):
        dist.barrier()
        found[f"{label}_stall_seconds"] = timed(lambda step=step: writer.save(step, fragments, {}, {}))
        found[f"{label}_background_seconds"] = timed(writer.wait)
    return found | {"snapshot_gib": writer.snapshot_bytes / GIB, "peak_gib": resident("VmHWM")}


def forget(path: Path) -> None:
    """Drop a checkpoint's files from the page cache."""
    for file in path.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def loading(root: Path, shapes: Shapes, rank: int, ranks: int, tensor: int) -> dict[str, float]:
    """Hashes checked, then fragments filled."""
    path = find(root)
    expected = {f.name: f for f in stand_ins(shapes, rank, ranks, tensor)}
    found = {"resident_before_gib": resident("VmRSS")}
    if rank == 0:
        forget(path)
    dist.barrier()
    found["verify_seconds"] = timed(lambda: verify(path, rank, ranks))
    if rank == 0:
        forget(path)
    dist.barrier()
    parts = owned(shapes, rank, ranks, tensor)
    fragments = [Fragment(*part, {s: torch.empty(part[3] - part[2]) for s in STATES}, {}) for part in parts]
    found["fragments_gib"] = sum(4 * f.numel * len(STATES) for f in fragments) / GIB
    found["load_seconds"] = timed(lambda: load_fragments(path, fragments, parameters=shapes))
    found["peak_gib"] = resident("VmHWM")
    for fragment in fragments:
        if tensor > 1 and fragment.shard.is_whole:
            continue  # a replica: the file has the values of one of its holders
        for state, values in fragment.tensors.items():
            assert torch.equal(values, expected[fragment.name].tensors[state]), (fragment.name, state)
    return found


def _rank(
    part: Callable[..., dict[str, float]], store: str, root: Path, shapes: Shapes, rank: int, ranks: int, tensor: int
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    found = part(root, shapes, rank, ranks, tensor)
    Path(f"{store}.{rank}").write_text(json.dumps(found))
    dist.barrier()


def on_all_ranks(
    part: Callable[..., dict[str, float]], root: Path, shapes: Shapes, ranks: int, tensor: int
) -> dict[str, float]:
    """`part` in new processes; of each figure the largest over the ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        processes = [
            context.Process(target=_rank, args=(part, store, root, shapes, rank, ranks, tensor))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit("a rank failed")
        records = [json.loads(Path(f"{store}.{rank}").read_text()) for rank in range(ranks)]
    return {key: max(record[key] for record in records) for key in records[0]}


def check_room(root: Path, need: int) -> None:
    """End with a message when memory or disk cannot take it."""
    available = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    memory, disk = int(available.split()[1]) * 1024, shutil.disk_usage(root).free
    if memory < 1.2 * need or disk < 2.1 * need:
        sys.exit(
            f"needs {1.2 * need / GIB:.1f} GiB of memory and {2.1 * need / GIB:.1f} GiB in {root}; "
            f"{memory / GIB:.1f} and {disk / GIB:.1f} are free: take a smaller --experiment"
        )


def main() -> None:
    """Measure, print, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="pre_1b", help="whose parameters: a name of conf/exp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks among them")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoint goes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    shapes = shapes_of(arguments.experiment)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    need = 4 * len(STATES) * parameters
    check_room(arguments.dir, need)
    place = (shapes, arguments.ranks, arguments.tensor)
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="nexa-checkpoint-") as folder:
        saved = on_all_ranks(saving, Path(folder), *place)
        loaded = on_all_ranks(loading, Path(folder), *place)
    print(f"{arguments.experiment}: {parameters:,} parameters, {need / GIB:.2f} GiB, {arguments.ranks} ranks")
    for title, found in (("save", saved), ("load", loaded)):
        for key, value in found.items():
            print(f"{title} {key:28}{value:8.2f}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"parameters": parameters, "bytes": need, "save": saved, "load": loaded}, indent=2) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
