"""The table of docs/parallelism.md: every layout of every placement against one plain process.

    python -m tests.dist.grid [--write docs/parallelism.md]

Exit code 1 when a cell is outside the tolerance of the contract.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

from tests.dist.common import PLACEMENTS, TOLERANCE, config, deviation, reference, run_jobs

BEGIN, END = "<!-- grid -->", "<!-- /grid -->"
STAGES = (0, 1, 2, 3)
Layout = tuple[int, int, bool]
"""(tensor-parallel ranks, data-parallel ranks, sequence parallelism)."""
LAYOUTS: list[Layout] = [(1, 1, False), (1, 2, False), (2, 1, False), (2, 1, True), (2, 2, False), (2, 2, True)]


def parallel(stage: int, layout: Layout, **extra: str) -> dict:
    """The config group of a cell."""
    return {"zero_stage": stage, "tensor": layout[0], "sequence": layout[2], **extra}


def cells(processes: int) -> dict[tuple[str, Layout], list[float]]:
    """The largest deviation at each ZeRO stage, for every placement and every layout of so many processes."""
    keys = [(name, layout) for name, layout in itertools.product(PLACEMENTS, LAYOUTS) if layout[0] * layout[1] == processes]
    mappings = [
        # two micro-batches on every rank
        config(name, train={"micro_batch_size": 4 // layout[1]}, parallel=parallel(stage, layout))
        for name, layout in keys
        for stage in STAGES
    ]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_jobs(Path(folder), mappings, processes, timeout=3600)
    worst = [
        deviation(outcome, reference(mapping)).worst for outcome, mapping in zip(outcomes, mappings, strict=True)
    ]
    return {key: worst[i * len(STAGES) : (i + 1) * len(STAGES)] for i, key in enumerate(keys)}


def main() -> int:
    """Run the grid, print the table as it grows, write it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page in which the table between the grid marks is replaced")
    chosen = parser.parse_args()
    found: dict[tuple[str, Layout], list[float]] = {}
    for processes in sorted({tensor * data for tensor, data, _ in LAYOUTS}):
        print(f"{processes} process(es) …", flush=True)
        found |= cells(processes)
    lines = ["| placement | TP | DP | SP | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |"]
    lines.append("|---|---|---|---|" + "---|" * len(STAGES))
    for placement, (tensor, data, sequence) in itertools.product(PLACEMENTS, LAYOUTS):
        shown = " | ".join(f"{cell:.1e}" for cell in found[placement, (tensor, data, sequence)])
        lines.append(f"| {placement} | {tensor} | {data} | {'on' if sequence else 'off'} | {shown} |")
    worst = max(max(row) for row in found.values())
    print("\n".join(lines))
    if chosen.write is not None:
        text = chosen.write.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        table = "\n".join(lines)
        chosen.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(f"largest deviation {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
