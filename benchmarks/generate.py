"""Speed of generation with the key-value cache and without it.

    python benchmarks/generate.py [--batch 1 8] [--out generate.json]

The model of `+exp=quickstart` (5.9M parameters) with its initial weights, fp32, greedy, one CPU thread. With and
without the cache take turns; the median counts. A token's time is that of the whole call: the prompt, the new tokens
and the choice of each. `per CPU second` counts the time that the process had a core, which on a shared machine is the
one to compare. The ids of both must be the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import nexa
from nexa.inference.generate import generate_batch
from nexa.inference.sampling import Sampling
from nexa.model.decoder import Decoder

CACHES = {"cache": True, "no cache": False}


def measure(model: Decoder, batch: int, prompt: int, new: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds) of `rounds` calls for each way. Raises SystemExit when they do not agree on the ids."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, model.config.vocab_size, (batch, prompt), generator=generator).tolist()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in CACHES}
    for turn in range(rounds + 1):
        found = []
        for name, cache in CACHES.items():
            count = new if turn else 8  # the first turn warms up
            begin = time.perf_counter(), time.process_time()
            found.append(generate_batch(model, prompts, Sampling(count, greedy=True), cache=cache))
            if turn:
                seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        if found[0] != found[1]:
            raise SystemExit(f"batch {batch}: with and without the cache differ")
    return seconds


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="prompts at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="new tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = nexa.build_model(["+exp=quickstart"]).eval()
    report = {
        "processor": platform.processor() or platform.machine(),
        "threads": arguments.threads,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt": arguments.prompt,
        "new_tokens": arguments.new,
        "results": {},
    }
    for batch in arguments.batch:
        seconds = measure(model, batch, arguments.prompt, arguments.new, arguments.rounds)
        rows = {}
        for name, times in seconds.items():
            tokens = batch * arguments.new
            wall, cpu = (tokens / statistics.median(column) for column in zip(*times, strict=True))
            rows[name] = {"tokens_per_second": wall, "tokens_per_cpu_second": cpu}
            print(f"batch {batch:3d}  {name:9s} {wall:8,.0f} tokens/s, {cpu:8,.0f} per CPU second", flush=True)
        report["results"][str(batch)] = rows
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
