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


def row(placement: str, layout: Layout) -> list[float]:
    """The largest deviation at each ZeRO stage."""
    micro = {"micro_batch_size": 4 // layout[1]}  # two micro-batches on every rank
    mappings = [config(placement, train=micro, parallel=parallel(stage, layout)) for stage in STAGES]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = run_jobs(Path(folder), mappings, processes=layout[0] * layout[1])
    return [
        deviation(outcome, reference(mapping)).worst for outcome, mapping in zip(outcomes, mappings, strict=True)
    ]


def main() -> int:
    """Run the grid, print the table as it grows, write it where it belongs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="page in which the table between the grid marks is replaced")
    chosen = parser.parse_args()
    head = "| placement | TP | DP | SP | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |"
    lines, worst = [head, "|---|---|---|---|" + "---|" * len(STAGES)], 0.0
    print("\n".join(lines), flush=True)
    for placement, layout in itertools.product(PLACEMENTS, LAYOUTS):
        cells = row(placement, layout)
        worst = max(worst, *cells)
        tensor, data, sequence = layout
        shown = " | ".join(f"{cell:.1e}" for cell in cells)
        lines.append(f"| {placement} | {tensor} | {data} | {'on' if sequence else 'off'} | {shown} |")
        print(lines[-1], flush=True)
    if chosen.write is not None:
        text = chosen.write.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        table = "\n".join(lines)
        chosen.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(f"largest deviation {worst:.1e}, tolerance {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
