import subprocess
import sys
import threading
import time

import pytest

from data_pipeline.loader import Prefetcher


@pytest.mark.parametrize("depth", [0, 1, 3, 100])
def test_order(depth):
    with Prefetcher(lambda step: step * step, 3, 20, depth) as steps:
        assert list(steps) == [step * step for step in range(3, 20)]


def test_reads_ahead_but_no_further_than_depth():
    seen = []
    loader = Prefetcher(lambda step: seen.append(step) or step, 0, 100, 2)
    assert next(loader) == 0
    deadline = time.monotonic() + 5
    while len(seen) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert seen == [0, 1, 2, 3]  # one taken, two waiting, one in hand
    loader.close()


@pytest.mark.parametrize("depth", [0, 2])
def test_exception_comes_in_its_turn(depth):
    def fetch(step):
        if step == 2:
            raise KeyError("step 2")
        return step

    loader = Prefetcher(fetch, 0, 5, depth)
    assert [next(loader), next(loader)] == [0, 1]
    with pytest.raises(KeyError, match="step 2"):
        next(loader)


def test_close_ends_the_thread_and_the_iteration():
    loader = Prefetcher(lambda step: step, 0, 10**9, 2)
    assert next(loader) == 0
    loader.close()
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "nexa-prefetch"]
    assert list(loader) == []


def test_a_forgotten_loader_does_not_hold_up_exit():
    code = "from data_pipeline.loader import Prefetcher; p = Prefetcher(lambda s: s, 0, 10**9, 2); print(next(p))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "0\n"
    assert done.stderr == ""
