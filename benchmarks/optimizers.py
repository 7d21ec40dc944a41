"""What an optimizer costs: time of one update against fused AdamW's, and what that is of a training step.

    python -m benchmarks.optimizers [--shape 34m 134m] [--only adamw muon sinkgd] [--out optimizers.json]

Each method with its file in conf/optim, made by `nexa.optim.build`, updates fp32 weights of a whole model from random
gradients in one process. AdamW takes turns with each, so that a ratio is of the same minutes; medians count, on a CPU
of wall clock and of the process's CPU time, which other processes disturb less. `refresh` is an update that computes
new bases, 1 in `every`; `mean` has its share of that.

A step of `--tokens` tokens is not run: it is computed, as forward and backward of the same model (bf16, compiled) for a
batch that fits, measured in the same process, times the tokens, plus the update. `over` is by how much more time such
a step takes than with AdamW. Other costs of a step (clipping, communication) would make that share smaller.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, Shape
from benchmarks.step import seconds_of
from nexa.config import compose
from nexa.config.schema import Config
from nexa.hardware import keep_freed_memory
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.optim import build
from nexa.optim.build import settings
from nexa.optim.methods import METHODS

SIZES = ("34m", "134m")
BASE = "adamw"
CLOCKS = ("wall", "cpu")


@dataclass(frozen=True)
class Taken:
    """Seconds of one action: by the clock, and of the process's processors."""

    wall: float
    cpu: float


def timed(action: Callable[[], object], device: torch.device) -> Taken:
    """Of one call, with the device's work done."""
    before = time.process_time()
    wall = seconds_of(action, device)
    return Taken(wall, time.process_time() - before)


def medians(found: list[Taken]) -> dict[str, float]:
    """Of each clock."""
    return {clock: statistics.median(getattr(one, clock) for one in found) for clock in CLOCKS}


class Update:
    """A method over the parameters of a model; gradients are given anew before each update, which may use them up."""

    def __init__(self, name: str, parameters: dict[str, nn.Parameter], gradients: list[Tensor]) -> None:
        cfg = compose([f"optim={name}"])
        self.every: int | None = getattr(cfg.optim, "refresh_every", None)
        self._parameters, self._gradients = list(parameters.values()), gradients
        self._optimizer = build(**{**settings(cfg), "lr": 1e-9}, named_parameters=parameters.items())

    def __call__(self, device: torch.device) -> Taken:
        """One update."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        return timed(self._optimizer.step, device)

    def rewind(self) -> None:
        """The next update is the first one again, which computes all bases; its moments are there already."""
        for state in self._optimizer.state.values():
            state["step"].zero_()


def measure(names: list[str], shape: Shape, device: torch.device, rounds: int, seconds: float) -> dict[str, Any]:
    """By method: `update`, AdamW's own beside it, and `refresh` with `every` where there is one, as lists of Taken.

    rounds: at most so many updates of each; a method that has had `seconds` of them ends after two.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Decoder(shape.model, Config().norm).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    drawn = {name: torch.randn(size, generator=generator, device=device) for name, size in shapes.items()}
    parameters = {name: nn.Parameter(0.02 * values) for name, values in drawn.items()}
    gradients = [1e-3 * values.flip(0) for values in drawn.values()]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    base = Update(BASE, parameters, gradients)
    base(device)
    found: dict[str, Any] = {}
    for name in names:
        mine = Update(name, parameters, gradients)
        mine(device)
        row: dict[str, Any] = {"update": [], "base": []}
        spent = 0.0
        while len(row["update"]) < rounds and (spent < seconds or len(row["update"]) < 2):
            row["base"].append(base(device))
            row["update"].append(mine(device))
            spent += row["update"][-1].wall
        if mine.every is not None:
            mine.rewind()
            row |= {"refresh": [mine(device)], "every": mine.every}
        found[name] = row
        print(f"{name}: {len(row['update'])} updates", flush=True)
        del mine
    return found


def forward_backward(shape: Shape, device: torch.device, rounds: int) -> list[Taken]:
    """Of one batch, bf16 and compiled, after two that are not counted."""
    model = Decoder(shape.model, Config().norm)
    initialise(model, shape.model, Config().norm, seed=0)
    model = model.to(device, torch.bfloat16)
    model.compile_parts()
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, shape.model.vocab_size, (shape.batch, shape.length + 1), generator=generator).to(device)
    ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def once() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        (model(ids, labels) / labels.numel()).backward()

    return [timed(once, device) for _ in range(rounds + 2)][2:]


def summary(found: dict[str, Any], passes: list[Taken], shape: Shape, tokens: int) -> dict[str, Any]:
    """Seconds, by clock, of a method's update, of a refresh, of their mean and of AdamW's beside it; `over`."""
    per_token = {clock: taken / (shape.batch * shape.length) for clock, taken in medians(passes).items()}
    rows: dict[str, Any] = {}
    for name, row in found.items():
        update, base = medians(row["update"]), medians(row["base"])
        refresh = medians(row["refresh"]) if "refresh" in row else None
        mean = {c: update[c] + (refresh[c] - update[c]) / row["every"] if refresh else update[c] for c in CLOCKS}
        rows[name] = {
            "update": update,
            "base": base,
            "refresh": refresh,
            "every": row.get("every"),
            "mean": mean,
            "over": {c: (mean[c] - base[c]) / (per_token[c] * tokens + base[c]) for c in CLOCKS},
        }
    return {"seconds_per_token": per_token, "step_of_tokens": tokens, "results": rows}


def report(shape: str, made: dict[str, Any]) -> str:
    """The table, in ms; `over` in percent of a whole step with AdamW, by both clocks."""
    per_token, tokens = made["seconds_per_token"], made["step_of_tokens"]
    lines = [
        f"\n{shape}: forward and backward {per_token['wall'] * 1e6:.1f} us a token ({per_token['cpu'] * 1e6:.1f} of "
        f"CPU), so {per_token['wall'] * tokens:.2f} s ({per_token['cpu'] * tokens:.2f}) for {tokens:,} tokens",
        f"{'':14}{'ms':>9}{'CPU ms':>9}{'AdamW':>9}{'CPU':>9}{'refresh':>10}{'every':>7}{'mean CPU':>10}"
        f"{'over':>9}{'CPU':>9}",
    ]
    for name, row in made["results"].items():
        refresh = f"{row['refresh']['cpu'] * 1e3:10.1f}{row['every']:7}" if row["refresh"] else f"{'':17}"
        lines.append(
            f"{name:14}{row['update']['wall'] * 1e3:9.1f}{row['update']['cpu'] * 1e3:9.1f}"
            f"{row['base']['wall'] * 1e3:9.1f}{row['base']['cpu'] * 1e3:9.1f}{refresh}"
            f"{row['mean']['cpu'] * 1e3:10.1f}{row['over']['wall']:9.2%}{row['over']['cpu']:9.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table for each shape, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SIZES))
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=12, help="updates of each, at most (default 12)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of updates of one method, about (default 30)")
    parser.add_argument("--passes", type=int, default=6, help="forward and backward passes (default 6)")
    parser.add_argument("--tokens", type=int, default=131072, help="of the step that is computed (default 131072)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shapes": {},
    }
    print(f"{result['device']}, {result['threads']} threads, torch {result['torch']}", flush=True)
    for name in arguments.shape:
        shape = SHAPES[name]
        passes = forward_backward(shape, device, arguments.passes)
        found = measure(arguments.only, shape, device, arguments.rounds, arguments.seconds)
        made = result["shapes"][name] = summary(found, passes, shape, arguments.tokens)
        print(report(name, made), flush=True)
        if arguments.out:  # after each size: the larger one takes long
            arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
