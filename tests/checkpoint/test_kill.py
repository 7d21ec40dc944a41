"""kill -9 at any instant leaves the newest complete checkpoint, and the next start goes on."""

import multiprocessing
import os
import random
import shutil
import time

import torch

from nexa.checkpoint import files
from nexa.checkpoint.load import find, list_checkpoints, load_fragments, read_state, verify
from nexa.checkpoint.save import CheckpointWriter

from .common import assert_filled, blank, cut, whole

KILLS = 20


def _train(root) -> None:
    """Save step after step, slowly enough that most kills fall inside a save; every third step is written twice."""
    torch.set_num_threads(1)
    real = files.write_all

    def slow(fd, piece):
        time.sleep(0.0005)
        real(fd, piece)

    files.write_all = slow
    writer = CheckpointWriter(root, keep_last=2)
    try:
        step = read_state(find(root))["tokens"] + 1
    except Exception:
        step = 1
    while True:
        for _ in range(2 if step % 3 == 0 else 1):
            writer.save(step, cut(whole(step), 0, 1, 0), {"tokens": step}, {}, {})
        step += 1


def test_twenty_kills(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "nexa.checkpoint.save", "nexa.checkpoint.load"])
    rng = random.Random(0)
    last, torn = 0, 0
    for _ in range(KILLS):
        process = context.Process(target=_train, args=(tmp_path,))
        process.start()
        _until_newer(tmp_path, last, process)
        time.sleep(rng.random() * 0.03)
        process.kill()
        process.join()
        torn += bool(list(tmp_path.glob("*.tmp")))
        path = find(tmp_path)
        verify(path)
        step = read_state(path)["tokens"]
        assert step > last, "a finished checkpoint was lost"
        last = step
        fragments = blank(whole(step), 0, 1, 0)
        load_fragments(path, fragments)
        assert_filled(fragments, whole(step))
    assert torn, "no kill hit a save: the test shows nothing"
    CheckpointWriter(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def _until_newer(root, last, process) -> None:
    end = time.monotonic() + 20
    while time.monotonic() < end and process.is_alive():
        if any(int(p.name[5:13]) > last for p in root.glob("step_????????")):
            return
        time.sleep(0.002)
    raise AssertionError("no checkpoint was written")


CALLS = [(files, "write_all"), *((os, name) for name in ("open", "fsync", "rename", "replace", "unlink", "rmdir"))]


def _die_at(root, countdown) -> None:
    """Save with replacement and pruning; die just before the `countdown`-th call that changes files."""
    torch.set_num_threads(1)
    writer = CheckpointWriter(root, keep_last=1)
    left = [countdown]

    def counting(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    os.fsync = lambda fd: None  # the kernel outlives the process; only the order of calls counts here
    for module, name in CALLS:
        setattr(module, name, counting(getattr(module, name)))
    writer.save(2, cut(whole(3), 0, 1, 0), {"seed": 3}, {}, {})
    writer.save(4, cut(whole(4), 0, 1, 0), {"seed": 4}, {}, {})
    writer.close()
    os._exit(0)


def test_death_before_every_single_call(tmp_path):
    """At each point the folder holds a whole checkpoint that is no older than before, and cleaning keeps it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "nexa.checkpoint.save", "nexa.checkpoint.load"])
    root, before, seen = tmp_path / "run", tmp_path / "before", []
    writer = CheckpointWriter(before)
    for step in (1, 2):
        writer.save(step, cut(whole(step), 0, 1, 0), {"seed": step}, {}, {})
    writer.close()
    for countdown in range(500):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(before, root)
        process = context.Process(target=_die_at, args=(root, countdown))
        process.start()
        process.join(20)
        for clean in (False, True):
            if clean:
                CheckpointWriter(root)
            for path in list_checkpoints(root):
                verify(path)
            path = find(root)
            seed = read_state(path)["seed"]
            assert seed in (2, 3, 4), countdown
            fragments = blank(whole(seed), 0, 1, 0)
            load_fragments(path, fragments)
            assert_filled(fragments, whole(seed))
        seen.append(seed)
        if process.exitcode == 0:
            break
        assert process.exitcode == 9
    assert seen == sorted(seen)
    assert set(seen) == {2, 3, 4}
    assert [p.name for p in root.iterdir()] == ["step_00000004"]
