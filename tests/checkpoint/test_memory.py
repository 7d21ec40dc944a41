"""Nothing gathers the model on one rank: peak memory of each rank while it saves and loads, as the kernel counts it."""

import os
from pathlib import Path

import pytest
import torch

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.load import find, load_fragments
from nexa.checkpoint.save import CheckpointWriter
from nexa.sharding import Shard

from .common import run_world

MIB = 1 << 20
LAYERS, SHAPE = 32, (512, 1024)  # fp32 weight and two moments: 6 MiB a layer
WHOLE = LAYERS * 6 * MIB
SELF = Path("/proc/self")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    line = next(line for line in (SELF / "status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class Growth:
    """Bytes by which this process grew at its peak inside a `with`."""

    def __enter__(self):
        (SELF / "clear_refs").write_text("5")  # forget the peak so far
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_):
        self.bytes = _status("VmHWM") - self._before


def _fragments(rank, world, tensor, fill):
    """Every layer cut into `tensor` shards along its columns, each divided over the other ranks."""
    place, data, data_size = rank % tensor, rank // tensor, world // tensor
    shard = Shard(SHAPE, 1, SHAPE[1] * place // tensor, SHAPE[1] * (place + 1) // tensor)
    start, stop = (shard.numel * n // data_size for n in (data, data + 1))
    return [
        Fragment(
            f"layers.{layer}",
            shard,
            start,
            stop,
            {s: torch.full((stop - start,), fill) for s in ("weight", "exp_avg", "exp_avg_sq")},
            {},
        )
        for layer in range(LAYERS)
    ]


def _save_and_load(rank, world, root, tensor):
    os.fsync = lambda fd: None  # memory is the subject, not the disk
    with Growth() as own:
        fragments = _fragments(rank, world, tensor, 1.0 + rank)
    assert own.bytes == pytest.approx(WHOLE / world, rel=0.2), "the measure sees what tensors take"
    writer = CheckpointWriter(root, rank=rank, world_size=world, message_bytes=MIB)
    with Growth() as saving:
        for step in (1, 2):
            writer.save(step, fragments, {}, {})
        writer.wait()
    assert writer.snapshot_bytes <= WHOLE / world + 6 * MIB
    # The snapshot, and some for messages (more of them wait on a busy machine), rows being put together and what
    # malloc keeps.
    bound = writer.snapshot_bytes + 48 * MIB
    assert saving.bytes < bound < WHOLE * 0.8, f"{saving.bytes / MIB:.0f} MiB, bound {bound / MIB:.0f}"
    writer.close()
    other = 1 if tensor > 1 else world
    again = _fragments(rank, world, other, float("nan"))
    with Growth() as loading:
        load_fragments(find(root), again)
    assert loading.bytes < 16 * MIB
    assert all(t.isfinite().all() for f in again for t in f.tensors.values())


@pytest.mark.skipif(not (SELF / "clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("world", "tensor"), [(2, 1), (4, 2)])
def test_no_rank_holds_the_model(tmp_path, world, tensor):
    run_world(world, _save_and_load, tmp_path, tensor)
