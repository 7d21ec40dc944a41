"""Time and memory of `nexa grow` on a checkpoint of any size, without training one.

    python -m benchmarks.grow [--experiment pre_1b] [--factor 4] [--moments reset] [--dir DIR] [--out FILE]

Writes a checkpoint with the sizes of an experiment: random weights and two moments, piece by piece. Then runs the
command on it from a cold page cache, in a process of its own: seconds, MB/s of what was written, largest resident
memory. Writing the source is timed too, as what this disk and the hashing of files allow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.checkpoint import GIB, forget
from nexa.checkpoint import catalog, files
from nexa.checkpoint.fragment import WEIGHT
from nexa.checkpoint.layout import file_key, kind_of
from nexa.config import compose
from nexa.interop.huggingface import config_json
from nexa.interop.import_ import seal
from nexa.interop.weights import PIECE, SHARD_BYTES, Progress, parameter_shapes, write_files

STATES = (WEIGHT, "exp_avg", "exp_avg_sq")
MB = 1e6


class Noise:
    """Tensors that repeat one piece of random numbers."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._piece = torch.rand(PIECE, generator=torch.Generator().manual_seed(0)) * 1e-2

    def chunks(self, name: str, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """See `nexa.interop.weights.Weights`."""
        left = math.prod(self._shapes[name.rpartition("/")[2]])
        while left > 0:
            yield self._piece[:left].to(dtype)
            left -= PIECE


def source(folder: Path, experiment: str) -> int:
    """Write the checkpoint; its bytes."""
    cfg = compose([f"+exp={experiment}"])
    shapes = parameter_shapes(cfg.model, cfg.norm)
    records: dict[str, files.FileRecord] = {}
    states: dict[str, dict[str, str]] = {name: {} for name in shapes}
    total = 0
    for kind in dict.fromkeys(map(kind_of, STATES)):
        keys = {file_key(s, name): shapes[name] for s in STATES if kind_of(s) == kind for name in shapes}
        done = write_files(
            Noise(shapes), keys, folder, dict.fromkeys(keys, torch.float32), kind, SHARD_BYTES, Progress(0, len)
        )
        records |= done.files
        total += done.total_bytes
        for state in (s for s in STATES if kind_of(s) == kind):
            for name in shapes:
                states[name][state] = done.homes[file_key(state, name)]
    ours = config_json(cfg.model, cfg.norm, eos_token_id=None)
    records[catalog.CONFIG] = files.write_json(folder / catalog.CONFIG, ours)
    counts = {"step": 1, "samples": 1, "tokens": 1, "skipped": 0}
    scalars = {name: {"step": 1.0} for name in shapes}
    state = {"state": counts, "data": {}, "optim": {}, "total_steps": 1, "tokens_by_source": {}, "scalars": scalars}
    seal(folder, records, shapes, states, 1, state)
    return total


def grown(folder: Path, result: Path, options: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and GiB at the peak of the command."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "nexa.cli.main", "grow", str(folder), str(result), *options]
    process = os.posix_spawn(sys.executable, command, {**os.environ, "OMP_NUM_THREADS": "1"})
    _, status, used = os.wait4(process, 0)
    if status:
        sys.exit(f"nexa grow ended with {os.waitstatus_to_exitcode(status)}")
    return time.perf_counter() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / GIB


def main() -> None:
    """Measure, print, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="pre_1b", help="whose sizes: a name of conf/exp")
    parser.add_argument("--factor", type=int, default=4)
    parser.add_argument("--moments", default="reset", choices=("reset", "copy", "scale"))
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="where the checkpoints go")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.dir, prefix="nexa-grow-") as place:
        first, second = Path(place, "source"), Path(place, "grown")
        first.mkdir()
        begin = time.perf_counter()
        bytes_before = source(first, arguments.experiment)
        writing = time.perf_counter() - begin
        forget(first)
        free = shutil.disk_usage(place).free
        need = bytes_before * arguments.factor / (1 if arguments.moments != "reset" else len(STATES))
        if free < 1.05 * need:
            sys.exit(f"needs {need / GIB:.1f} GiB more in {arguments.dir}; {free / GIB:.1f} are free")
        options = ["--operator", "stack", "--factor", str(arguments.factor), "--moments", arguments.moments]
        seconds, cpu, peak = grown(first, second, options)
        written = sum(file.stat().st_size for file in second.iterdir())
    found = {
        "source_bytes": bytes_before,
        "source_mb_per_second": bytes_before / writing / MB,
        "grown_bytes": written,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mb_per_second": written / seconds / MB,
        "peak_gib": peak,
    }
    print(f"{arguments.experiment}, factor {arguments.factor}, moments {arguments.moments}")
    for key, value in found.items():
        print(f"{key:24}{value:18,.2f}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
