"""transformers' LLaMA in a process of its own, as its users have it: without what nexa asks of the allocator.

    python -m benchmarks.own_process NAME JOB

NAME is one of benchmarks/shapes.py, JOB that of benchmarks/peer_turns.py, at whose orders steps are taken.
"""

from __future__ import annotations

import sys

from benchmarks.peer_turns import take_turns, the_job
from benchmarks.shapes import SHAPES
from benchmarks.step import Setting, transformers_llama


def main() -> None:
    """Build, then take turns."""
    shape = SHAPES[sys.argv.pop(1)]
    job, device, _ = the_job()
    take_turns(job, device, transformers_llama(Setting(shape, job["precision"], device)))


if __name__ == "__main__":
    main()
