"""Speed of reading training batches: one process, from a packed store, without the thread that reads ahead.

    python -m benchmarks.loader [--tokens 200000000] [--length 2048] [--rate 4000 100000] [--out loader.json]

A synthetic store of documents of 20 to 2,000 tokens, just written and so in the page cache. `fetch` is what a run's
reading thread calls: it places the step's rows in the order, reads, shifts and masks them. Shares are of the step of a
rank that trains `rate` tokens a second: by default what two CPU cores do with 34M parameters, and about what an H200
could do with 1.3B at half of its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.writer import StoreWriter
from nexa.config import from_mapping
from nexa.parallel.topology import connect, disconnect
from nexa.train.data import TrainingData
from nexa.train.sources import open_sources

ROWS = 16
CASES: dict[str, dict[str, Any]] = {
    "chunks": {},
    "chunks, documents masked": {"document_mask": True},
    "best fit": {"packing": "best_fit", "document_mask": True},
    "padded": {"packing": "pad", "document_mask": True},
    "two sources, 70 : 30": {"source": [("{store}", 0.7), ("{other}", 0.3)]},
}


def write_store(folder: Path, tokens: int, seed: int) -> Path:
    """A store of about so many tokens."""
    folder.mkdir()
    writer, rng = StoreWriter(folder, np.dtype("<u2"), 10**9), np.random.default_rng(seed)
    for _ in range(max(1, tokens // 1_010_000)):
        lengths = rng.integers(20, 2000, 1000)
        writer.append("train", rng.integers(0, 250, int(lengths.sum())).astype("<u2"), lengths)
    writer.finish(load_tokenizer("bytes"), {})
    return folder


def seconds(data: dict[str, Any], length: int, steps: int) -> tuple[float, list[float]]:
    """Of making the order, and of each step's rows."""
    cfg = from_mapping(
        {
            "data": {**data, "sequence_length": length},
            "model": {"vocab_size": 320, "max_position_embeddings": length},
            "train": {"steps": steps, "global_batch_size": ROWS, "micro_batch_size": ROWS},
        }
    )
    topology = connect(cfg)
    begin = time.perf_counter()
    reader = TrainingData(cfg, topology, open_sources(cfg, topology))
    reader.fetch(0)
    opening, taken = time.perf_counter() - begin, []
    for step in range(1, steps):
        begin = time.perf_counter()
        reader.fetch(step)
        taken.append(time.perf_counter() - begin)
    disconnect()
    return opening, taken


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the store")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=300, help=f"of {ROWS} rows")
    parser.add_argument("--rate", type=float, nargs="+", default=[4000.0, 100_000.0], help="tokens a second of a rank")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    heads = "".join(f"{f'at {rate:,.0f}/s':>14}" for rate in arguments.rate)
    print(f"{'':26}{'opening s':>10}{'us a row':>10}{'tokens/s':>14}{heads}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder, "store"), arguments.tokens, 0)
        other = write_store(Path(folder, "other"), arguments.tokens // 4, 1)
        for name, keys in CASES.items():
            mixture = [
                {"path": path.format(store=store, other=other), "weight": weight}
                for path, weight in keys.get("source", ())
            ]
            opening, taken = seconds({"source": str(store), **keys, **({"source": mixture} if mixture else {})},
                                     arguments.length, arguments.steps)  # fmt: skip
            row = statistics.median(taken) / ROWS
            shares = [row * rate / arguments.length for rate in arguments.rate]
            results[name] = {"opening_seconds": opening, "row_seconds": row, "shares": shares}
            print(
                f"{name:26}{opening:10.2f}{row * 1e6:10.1f}{arguments.length / row:14,.0f}"
                + "".join(f"{share:14.3%}" for share in shares)
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
