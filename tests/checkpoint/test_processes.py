"""Several gloo processes: written with one cut, read with another; failures reach every rank."""

import errno
import json
import os

import pytest
import safetensors
import torch

from nexa.checkpoint import files
from nexa.checkpoint.load import find, list_checkpoints, load_fragments, load_state_dict, read_state, verify
from nexa.checkpoint.save import CheckpointWriter
from nexa.errors import UserError

from .common import SHAPES, assert_filled, blank, cut, run_world, whole


def _write(rank, world, root, seeds, tensor=1):
    """A checkpoint per seed of the cut; small odd messages so that pieces are split."""
    writer = CheckpointWriter(root, rank=rank, world_size=world, message_bytes=53)
    for seed in seeds:
        step = 100 + seed
        fragments = cut(whole(step), rank, world, seed, tensor)
        writer.save(step, fragments, {"tokens": step}, {"model_type": "llama"}, {})
        for fragment in fragments:
            for state in fragment.tensors.values():
                state.zero_()
        # No rank holds more than its share: nothing gathers the model.
        total = sum(4 * t.numel() for tensors in whole(0).values() for t in tensors.values())
        largest = max(sum(4 * t.numel() for t in tensors.values()) for tensors in whole(0).values())
        assert writer.snapshot_bytes <= total / world + largest
    writer.wait()
    # `wait` means that the whole checkpoint is there, on every rank.
    assert find(root).name == f"step_{100 + max(seeds):08d}"
    writer.close()


def _write_prepared(rank, world, root):
    writer = CheckpointWriter(root, rank=rank, world_size=world)
    writer.prepare(cut(whole(0), rank, world, 2))
    writer._join()
    taken = {key: buffer.data_ptr() for key, buffer in writer._buffers.items()}
    assert taken and writer.snapshot_bytes > 0
    writer.save(100, cut(whole(0), rank, world, 2), {"tokens": 0}, {})
    assert {key: buffer.data_ptr() for key, buffer in writer._buffers.items()} == taken, "not the memory prepared"
    writer.prepare(cut(whole(0), rank, world, 2))
    writer.save(101, cut(whole(1), rank, world, 3), {"tokens": 1}, {})  # another layout than the one prepared for
    writer.close()


def test_memory_of_snapshots_is_taken_before(tmp_path):
    run_world(2, _write_prepared, tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2
    run_world(3, _read, tmp_path, [5])


def _read(rank, world, root, seeds, tensor=1):
    for path in list_checkpoints(root):
        verify(path, rank, world)
        step = read_state(path)["tokens"]
        for seed in seeds:
            fragments = blank(whole(step), rank, world, seed, tensor)
            scalars = load_fragments(path, fragments, parameters=SHAPES)
            assert_filled(fragments, whole(step))
            assert scalars == {name: {"step": 3.0 + index} for index, name in enumerate(SHAPES)}


@pytest.mark.parametrize(
    ("writers", "readers"),
    [((1, 1), (4, 2)), ((2, 1), (3, 1)), ((4, 2), (2, 1)), ((3, 1), (1, 1)), ((4, 4), (4, 2)), ((2, 2), (4, 4))],
)
def test_written_by_some_read_by_others(tmp_path, writers, readers):
    """(processes, tensor-parallel ranks) of each."""
    seeds = [-1, *range(6)]
    run_world(writers[0], _write, tmp_path, seeds, writers[1])
    assert len(list_checkpoints(tmp_path)) == len(seeds)
    run_world(readers[0], _read, tmp_path, [-1, 13, 14, 15], readers[1])
    assert not list(tmp_path.glob("*.tmp"))


def test_two_writers_make_a_sharded_hugging_face_folder(tmp_path):
    run_world(2, _write, tmp_path, [7])
    path = find(tmp_path)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    weights = {name: tensors["weight"] for name, tensors in whole(107).items()}
    assert index["metadata"]["total_size"] == sum(4 * w.numel() for w in weights.values())
    for name, file in index["weight_map"].items():
        with safetensors.safe_open(path / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), weights[name])
    ours = load_state_dict(path)
    assert ours.keys() == weights.keys()
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


def _save_and_wait(writer, step, rank, world):
    writer.save(step, cut(whole(step), rank, world, 1), {}, {}, {})
    writer.wait()


def _fill_disk(rank, world, root, culprit, asynchronous, step):
    """The disk of one rank is full at `step`; every rank hears of it; step 3 works again."""
    writer = CheckpointWriter(root, rank=rank, world_size=world, asynchronous=asynchronous)
    _save_and_wait(writer, 1, rank, world)
    real = files.write_all

    def full(fd, piece):
        # At step 1 rank 0 fails late, at the manifest, while the other waits and an older step 1 is in place.
        if step == 1 and rank == 0 and b"nexa-checkpoint" not in bytes(piece):
            return real(fd, piece)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if rank == culprit:
        files.write_all = full
    with pytest.raises(UserError) as caught:
        _save_and_wait(writer, step, rank, world)
    files.write_all = real
    message = str(caught.value)
    assert f"step {step}" in message
    assert "disk is full" in message or (rank != culprit and "given up" in message)
    assert [p.name for p in list_checkpoints(root)] == ["step_00000001"]
    _save_and_wait(writer, 3, rank, world)
    writer.close()
    assert find(root).name == "step_00000003"


@pytest.mark.parametrize(("culprit", "step"), [(0, 2), (1, 2), (0, 1), (1, 1)])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank(tmp_path, culprit, asynchronous, step):
    run_world(2, _fill_disk, tmp_path, culprit, asynchronous, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]
    verify(find(tmp_path))


def _subgroups(rank, world, root):
    """Two independent groups of two ranks, each with its own checkpoints."""
    groups = [torch.distributed.new_group([0, 2]), torch.distributed.new_group([1, 3])]
    group, mine = groups[rank % 2], rank // 2
    own = root / str(rank % 2)
    writer = CheckpointWriter(own, rank=mine, world_size=2, group=group)
    writer.save(rank % 2, cut(whole(rank % 2), mine, 2, 5), {"tokens": rank % 2}, {}, {})
    writer.close()
    _read(mine, 2, own, [6])


def test_a_group_that_is_not_the_world(tmp_path):
    run_world(4, _subgroups, tmp_path)


def _private_disk(rank, world, root):
    """Ranks that do not see one directory."""
    writer = CheckpointWriter(root / str(rank), rank=rank, world_size=world, timeout=0.5)
    with pytest.raises(UserError, match="directory that all ranks share" if rank == 0 else "not all ranks share"):
        _save_and_wait(writer, 1, rank, world)


def test_a_disk_that_is_not_shared(tmp_path):
    run_world(2, _private_disk, tmp_path)
    assert not list(tmp_path.glob("*/step_*"))
