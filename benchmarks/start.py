"""How long a run takes to its first step, what it waits for data, and how long saving holds it up.

    python -m benchmarks.start [--rounds 3] [--out start.json] [key=value ...]

train.py of a new process, the quickstart's model on text that is already a packed store: seconds from the command to
each of what it says and to the first row of metrics, so import, model, optimizer, data and one step. Steps are short
(0.1 to 1 s), which is the worst case for data and saves. `waiting` and `saving` are of the median step.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
SAVED = r"training waited ([0-9.]+) s"
KEYS = (
    "+exp=quickstart", "train.steps=40", "schedule.warmup_steps=5", "log.every=1", "log.plot=false",
    "log.sample_tokens=0", "eval.every=0", "eval.at_end=false", "checkpoint.every=10",
)  # fmt: skip
CASES = {
    "one process": (1, ()),
    "one process, compiled": (1, ("train.compile=true",)),
    "two processes, ZeRO 1": (2, ("parallel.zero_stage=1",)),
}


def one(processes: int, keys: tuple[str, ...], folder: Path) -> dict[str, float]:
    """A run from its command to its end."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [*launcher, "train.py", *KEYS, f"run.dir={folder}", *keys]
    rows, begin = folder / "metrics.jsonl", time.perf_counter()
    log = folder.with_suffix(".log")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=out)
    while process.poll() is None and not (rows.exists() and rows.stat().st_size):
        time.sleep(0.02)
    first = time.perf_counter() - begin
    if process.wait():
        raise RuntimeError(f"{' '.join(command)} ended with code {process.returncode}")
    stalls = [float(seconds) for seconds in re.findall(SAVED, log.read_text(encoding="utf-8"))]
    return {"first_row": first, **waits([json.loads(line) for line in rows.read_text().splitlines()], stalls)}


def waits(rows: list[dict[str, Any]], stalls: list[float]) -> dict[str, float]:
    """Shares of the median step, from rows of metrics (the first five do not count) and the seconds of saves."""
    later = [row for row in rows if row.get("step", 0) > 5]
    steps = [row["step_seconds"] for row in later if "step_seconds" in row]
    step = statistics.median(steps)
    data = statistics.median(row["data_seconds"] for row in later if "data_seconds" in row)
    return {"step": step, "waiting": data / step, "first_save": stalls[0] / step, "saving": max(stalls[1:]) / step}


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("keys", nargs="*", metavar="key=value", help="of train.py")
    arguments = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        one(1, tuple(arguments.keys), Path(folder, "first"))  # makes the store, fills the page cache
        for number in range(arguments.rounds):
            for name, (processes, keys) in CASES.items():
                run = Path(folder, f"{number}_{list(CASES).index(name)}")
                results[name].append(one(processes, (*keys, *arguments.keys), run))
    print(f"{'':24}{'first row s':>12}{'step ms':>10}{'waiting':>10}{'first save':>12}{'later saves':>13}")
    for name, found in results.items():
        middle = {key: statistics.median(each[key] for each in found) for key in found[0]}
        print(
            f"{name:24}{middle['first_row']:12.1f}{middle['step'] * 1e3:10.1f}{middle['waiting']:10.2%}"
            f"{middle['first_save']:12.1%}{middle['saving']:13.1%}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
