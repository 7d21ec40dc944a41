"""How many threads a process of a run takes."""

from __future__ import annotations

import pytest

from nexa.parallel.topology import _threads


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1", "RANK": "0"}, 4),
        ({"OMP_NUM_THREADS": "3", "RANK": "0"}, 3),
        ({"OMP_NUM_THREADS": "many"}, 4),
    ],
)
def test_threads_of_a_process(environment: dict[str, str], threads: int) -> None:
    assert _threads(environment, cores=8, local_world=2) == threads
