"""How near the final loss predicted from the first part of a run is to the one it had, on public curves.

    python -m benchmarks.live --curves DIR [--out live.json]

DIR as for benchmarks.laws. For every run that is logged from its beginning to its end: the forecast after a quarter,
half and three quarters of the updates against the last loss. Medians of the relative error, the share of runs inside
the 95 % interval, its median half-width, and milliseconds of a forecast.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.laws import TEST, TRAIN, curves, logged
from nexa.errors import UserError
from nexa.scaling.laws.curves import Curve
from nexa.scaling.laws.live import Live

SHARES = (0.25, 0.5, 0.75)
WHOLE = 0.97
"""Share of the updates that the rows of a run must reach."""
BEGINNING, ROWS = 0.3, 20
"""Share at which its first row may be, and least number of rows."""


def whole_runs(folder: Path) -> Iterator[tuple[str, Curve]]:
    """Kind and curve of every complete run."""
    for size in sorted((folder / "mpl").glob("csv_*")):
        for curve in curves(size, TRAIN + TEST):
            yield "MultiPowerLaw", curve
    index = folder / "schaipp2025" / "index.csv"
    for row in csv.DictReader(index.open()) if index.exists() else []:
        if row["scheduler"] in ("cos", "wsd"):
            try:
                yield f"lr-scheduling {row['scheduler']}", logged(index.parent, row)
            except UserError:
                continue  # its logged rates are not those of its entry, or it has no rows of its own


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, required=True, metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments = parser.parse_args()
    found: dict[tuple[str, float], list[tuple[float, float, float]]] = defaultdict(list)
    seconds = []
    for kind, curve in whole_runs(arguments.curves):
        total, index = curve.rates.total, curve.index
        if index[-1] < WHOLE * total or index[0] > BEGINNING * total or len(index) < ROWS:
            continue
        for share in SHARES:
            live = Live(curve.rates)
            for at, loss in zip(index[index <= share * total], curve.loss, strict=False):
                live.add(int(at), float(loss))
            begin = time.process_time()
            forecast = live.forecast()
            seconds.append(time.process_time() - begin)
            if forecast is not None:
                end = float(curve.loss[-1])
                half = (forecast.high - forecast.low) / 2 / end
                found[kind, share].append((forecast.final / end - 1, half, forecast.low <= end <= forecast.high))
    result = []
    for (kind, share), rows in sorted(found.items()):
        error, half, inside = np.array(rows, dtype=np.float64).T
        entry = {
            "runs": kind,
            "after": share,
            "count": len(rows),
            "median_error": float(np.median(np.abs(error))),
            "worst_error": float(np.abs(error).max()),
            "inside": float(inside.mean()),
            "half_width": float(np.median(half)),
        }
        result.append(entry)
        print(
            f"{kind:<18} after {share:.0%}: {len(rows)} runs, median error {entry['median_error']:.2%}, worst "
            f"{entry['worst_error']:.1%}, inside {entry['inside']:.0%}, interval +-{entry['half_width']:.1%}"
        )
    print(f"a forecast takes {np.median(seconds) * 1e3:.1f} ms of one core")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
