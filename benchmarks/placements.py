"""What each placement of norms costs: seconds of a training step against Pre-LN's, in one run.

    python -m benchmarks.placements [--shape 34m] [--only pre lns peri] [--kind rmsnorm] [--out placements.json]

bf16 weights and activations, fp32 master weights, clipping and fused AdamW, blocks compiled by torch.compile (which
fuses norms with the additions around them), bare loop, no engine. Contestants take turns in one process and the
medians count; `pre again` is Pre-LN once more, and says what the ratios of this run are worth.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.shapes import SHAPES, Shape, default_shape
from benchmarks.step import Setting, Step, bare_loop, seconds_of
from nexa.config.schema import NormConfig, NormKind, Placement
from nexa.hardware import keep_freed_memory
from nexa.model.decoder import Decoder
from nexa.model.init import initialise

AGAIN = "pre again"
NAMES = (*(name for name in get_args(Placement) if name != "none"), AGAIN)


def contestant(placement: str, kind: str, shape: Shape, device: torch.device) -> Step:
    """A compiled model with its optimizer."""
    norm = NormConfig(placement=placement.removesuffix(" again"), kind=kind)  # type: ignore[arg-type]
    model = Decoder(shape.model, norm)
    initialise(model, shape.model, norm, seed=0)
    return bare_loop(model, Setting(shape, "bf16", device))


def measure(names: list[str], kind: str, shape: Shape, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of `rounds` steps of each contestant, taking turns."""
    # each placement is its own compilation of the same code: more than the limit that guards against loops
    torch._dynamo.config.recompile_limit = 8 * len(names)
    torch._dynamo.config.accumulated_recompile_limit = 64 * len(names)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, shape.model.vocab_size, (shape.batch, shape.length + 1), generator=generator).to(device)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    steps = {}
    for name in names:
        steps[name] = contestant(name, kind, shape, device)
        for _ in range(2):
            steps[name](ids, labels)
        print(f"{name} is compiled", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        order = names if turn % 2 == 0 else names[::-1]
        for name in order:
            seconds[name].append(seconds_of(lambda step=steps[name]: step(ids, labels), device))
    return seconds


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: 34m on a CPU, 1b on a GPU")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--kind", choices=get_args(NormKind), default="rmsnorm")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each (default 12)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    shape_name = arguments.shape or default_shape(device.type)
    if device.type == "cpu":
        keep_freed_memory()
    names = ["pre", *(name for name in arguments.only if name != "pre")]
    seconds = measure(names, arguments.kind, SHAPES[shape_name], device, arguments.rounds)
    base = statistics.median(seconds["pre"])
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": shape_name,
        "kind": arguments.kind,
        "results": {
            name: {
                "step_seconds": statistics.median(taken),
                "fastest_step_seconds": min(taken),
                "ratio": statistics.median(taken) / base,
                "ratio_of_fastest": min(taken) / min(seconds["pre"]),
            }
            for name, taken in seconds.items()
        },
    }
    print(f"{result['device']}, {result['threads']} threads, torch {result['torch']}, shape {shape_name}")
    print(f"{'':14}{'ms/step':>9}{'to pre':>8}{'fastest':>9}{'to pre':>8}")
    for name, row in result["results"].items():
        print(
            f"{name:14}{row['step_seconds'] * 1e3:9.1f}{row['ratio']:8.3f}"
            f"{row['fastest_step_seconds'] * 1e3:9.1f}{row['ratio_of_fastest']:8.3f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
