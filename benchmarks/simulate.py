"""The simulator of `nexa plan --simulate` against published measurements.

    python -m benchmarks.simulate [--sources | --fit]

Every row of benchmarks/published.py with the speed that nexa.scaling.step_time works out, those to which a constant
was fitted apart from those that were held out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator

from benchmarks.published import ASSUMED, MODELS, ROWS, SOURCES, Row, Shape, fitted
from nexa.hardware import GPUS, Gpu, peak_of
from nexa.scaling import compute, step_time
from nexa.scaling.collectives import Network
from nexa.scaling.compute import REACH, Chip, Work, micro_batch, reach_of
from nexa.scaling.step_time import StepTime, Strategy, tensor_passes, time_of

# torchtitan's: bandwidth and power by its own page, the peak is that of the usual H100
DEVICES = GPUS | {"H100-500W": Gpu("H100-500W", "H100 80GB HBM3", 96e9, 2.4e12, 450e9, "torchtitan: HBM2e, 500 W")}
RECOMPUTE = {
    "none": (0.0, False, False),
    "every other product": (0.5, True, False),  # torchtitan's selective kind keeps attention and half the products
    "half": (0.5, False, False),
    "full": (1.0, True, True),
}
"""Checkpointing -> (share of forward products repeated, what is between them too, attention too)."""
GOOD = 0.15
MOST = 0.9
"""Largest share of the peak that a fit may give to matrix products; A100's ends there."""
LIMITED = dataclasses.replace(REACH["Hopper"], matrix=0.677)
"""An H100 held at 500 W."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A row and what the model says of it."""

    row: Row
    time: StepTime
    predicted: float
    """In the unit of `row.published`."""

    @property
    def error(self) -> float:
        """Predicted over published, less one."""
        return self.predicted / self.row.published - 1


def matrices(shape: Shape, tensor: int) -> tuple[Counter[tuple[int, int]], float]:
    """(rank's matrices of all blocks, their inputs and outputs per token with sequence parallelism)."""
    head = shape.hidden // shape.heads
    q, kv = shape.hidden // tensor, shape.kv_heads * head // tensor
    inner = shape.inner // tensor
    entering = [q, kv, kv, inner, inner] if shape.gated else [q, kv, kv, inner]
    block = Counter([(size, shape.hidden) for size in entering] + [(shape.hidden, size) for size in (q, inner)])
    every = Counter({size: count * shape.layers for size, count in block.items()})
    # the side that is not cut belongs to the residual stream, of which each rank has its part of the tokens
    whole = shape.hidden / tensor
    sides = 2 * (q + whole) + 2 * (kv + whole) + (3 if shape.gated else 2) * (inner + whole)
    return every, sides * shape.layers


def parameters(shape: Shape) -> float:
    """Matrix parameters, a tied head once."""
    head = shape.hidden // shape.heads
    block = 2 * shape.hidden * (shape.hidden + shape.kv_heads * head)
    block += (3 if shape.gated else 2) * shape.hidden * shape.inner
    return block * shape.layers + (1 if shape.tied else 2) * shape.vocabulary * shape.hidden


def flops_per_token(shape: Shape, sequence: int) -> float:
    """Training FLOPs as the sources and nexa count them: 6 for each matrix weight but the input embedding, 12 L h T."""
    table = 0 if shape.tied else shape.vocabulary * shape.hidden
    return 6 * (parameters(shape) - table) + 12 * shape.layers * shape.hidden * sequence


def predict(row: Row) -> Result:
    """Work out one row."""
    shape, gpu = MODELS[row.model], DEVICES[row.gpu]
    peak, _ = peak_of(gpu.device, "bf16")
    assert peak is not None
    chip = Chip(peak, gpu.bandwidth, LIMITED if gpu.name == "H100-500W" else reach_of(gpu.name))
    products, rest, attention = RECOMPUTE[row.again]
    tokens = row.micro * row.sequence
    every, between = matrices(shape, row.tensor)
    work = Work(
        matrices=every,
        between=between,
        head=(shape.vocabulary // row.tensor, shape.hidden),
        attention=shape.layers * shape.hidden // row.tensor,
        tokens=tokens,
        sequence=row.sequence,
        attention_share=row.attention,
        products_again=products,
        rest_again=rest,
        attention_again=attention,
    )
    strategy = Strategy(
        data=row.gpus // row.tensor,
        tensor=row.tensor,
        stage=row.stage,
        accumulation=row.accumulation,
        elements=parameters(shape) / row.tensor,
        pieces=shape.layers + 2,
        stream=tokens * shape.hidden * 2,
        passes=tensor_passes(shape.layers, row.again != "none"),
        sequence=True,
        reduce_width=row.reduce_width,
        early_gather=True,
    )
    time = time_of(strategy, micro_batch(work, chip), chip.bandwidth, Network(gpu.link, row.network))
    speed = row.accumulation * tokens / row.tensor / time.total
    return Result(row, time, speed * (flops_per_token(shape, row.sequence) if row.in_flops else 1))


HEADER = (
    "source",
    "model",
    "GPUs",
    "length",
    "micro",
    "stage",
    "tensor",
    "recomputes",
    "published",
    "model says",
    "error",
)


def _cells(result: Result) -> tuple[str, ...]:
    row = result.row
    values = [row.published, result.predicted]
    shown = [f"{v / 1e12:.0f} TFLOP/s" if row.in_flops else f"{v:,.0f}" for v in values]
    batch = f"{row.micro} x {row.accumulation}" if row.accumulation > 1 else str(row.micro)
    what = f"{row.again}{', compiled' if row.compiled else ''}"
    place = f"{row.gpus} x {row.gpu}"
    return (
        row.source,
        row.model,
        place,
        str(row.sequence),
        batch,
        str(row.stage),
        str(row.tensor),
        what,
        *shown,
        f"{result.error:+.0%}",
    )


def table(results: Iterable[Result]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|" + "---|" * len(HEADER)
    for result in results:
        yield "| " + " | ".join(_cells(result)) + " |"


def summary(results: list[Result]) -> str:
    """One line: how many, how many are near, how far off the middle one and the worst are."""
    errors = [abs(result.error) for result in results]
    near = sum(error <= GOOD for error in errors)
    return (
        f"{near} of {len(errors)} within {GOOD:.0%}; median error {statistics.median(errors):.1%}, "
        f"largest {max(errors):.1%}"
    )


def fit() -> list[float]:
    """The five constants, fitted again: shares of products on Ampere, Hopper and Hopper at 500 W, PASSES, COPIES."""
    from scipy.optimize import least_squares

    rows = [row for row in ROWS if fitted(row)]

    def errors(values: list[float]) -> list[float]:
        global LIMITED
        for name, share in zip(("Ampere", "Hopper"), values, strict=False):
            compute.REACH[name] = dataclasses.replace(compute.REACH[name], matrix=share)
        LIMITED = dataclasses.replace(compute.REACH["Hopper"], matrix=values[2])
        compute.PASSES, step_time.COPIES = values[3], values[4]
        return [math.log1p(predict(row).error) for row in rows]

    bounds = [0.3, 0.3, 0.3, 1.0, 0.0], [MOST, MOST, MOST, 30.0, 30.0]
    return list(least_squares(errors, [0.7, 0.6, 0.5, 7.0, 4.0], bounds=bounds).x)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", action="store_true", help="also where the figures are from, and what was assumed")
    parser.add_argument("--fit", action="store_true", help="fit the constants again and print them")
    arguments = parser.parse_args()
    if arguments.fit:
        print(", ".join(f"{value:.3f}" for value in fit()))
        return
    results = [predict(row) for row in ROWS]
    for name, wanted in (("constants were fitted to these", True), ("held out", False)):
        chosen = [result for result in results if fitted(result.row) == wanted]
        print(f"\n{name}: {summary(chosen)}\n")
        print("\n".join(table(chosen)))
    if arguments.sources:
        print("\n" + "\n".join(f"{name}: {where}" for name, where in SOURCES.items()) + f"\n\nassumed: {ASSUMED}")


if __name__ == "__main__":
    main()
