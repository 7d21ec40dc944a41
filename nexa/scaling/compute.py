"""Time that one GPU needs for the arithmetic of a micro-batch, from the shapes of its matrix products.

Three kinds of work, one after the other, as kernels run:

* a matrix product takes the longer of its FLOPs at `matrix` of the peak and its bytes at the memory's bandwidth, with
  sides rounded up to the tile that a kernel works on, so narrow and short products reach less of the peak;
* attention of the flash type does the half of the T x T scores that a causal mask leaves, and in the backward pass
  5/2 of the forward's FLOPs (arXiv 2307.08691, section 3.1.2: 5 products where the forward has 2);
* everything between the products reads and writes their inputs and outputs `PASSES` times, forward and backward
  together: norms, activation function, rotation, residual sums, casts, loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

TILE = 128
"""Sides of a matrix product's result are worked on in multiples of this (CUTLASS's usual thread block tile)."""
PASSES = 12.2
"""Reads and writes of every input and output of a matrix product by what is between them, forward and backward.
Calibrated: docs/simulate.md."""
FORWARD_PASSES = 1 / 3
"""Of them, in the forward pass."""
BACKWARD_ATTENTION = 2.5
"""FLOPs of the backward pass of attention over those of the forward pass."""


@dataclass(frozen=True)
class Reach:
    """Share of the peak FLOP/s that kernels of one architecture reach while a step runs."""

    matrix: float
    """Large matrix products. Calibrated: docs/simulate.md."""
    attention: float
    source: str
    """Of `attention`."""


REACH = {
    "Ampere": Reach(0.90, 0.60, "50 to 73% on A100: FlashAttention-2, arXiv 2307.08691"),
    "Hopper": Reach(0.75, 0.35, "FlashAttention-2 on H100: arXiv 2407.08608"),
}
"""Architecture -> shares."""
ARCHITECTURES = (("B200", "Hopper"), ("GH200", "Hopper"), ("H", "Hopper"))
"""Beginnings of names in `nexa.hardware.GPUS` -> row of `REACH`; every other GPU takes Ampere's. Only A100 and H100
have been compared with measurements."""


def architecture_of(gpu: str) -> str:
    """Row of `REACH` whose shares a GPU takes, by its name."""
    return next((found for start, found in ARCHITECTURES if gpu.startswith(start)), "Ampere")


def reach_of(gpu: str) -> Reach:
    """The shares of a GPU by its name."""
    return REACH[architecture_of(gpu)]


@dataclass(frozen=True)
class Chip:
    """One GPU as this model sees it."""

    peak: float
    """Dense FLOP/s of the working precision."""
    bandwidth: float
    """Bytes per second of its memory."""
    reach: Reach


@dataclass(frozen=True)
class Work:
    """What one rank computes for one micro-batch."""

    matrices: Mapping[tuple[int, int], int]
    """(outputs, inputs) of the rank's part of a matrix -> how many there are in all blocks."""
    between: float
    """Inputs and outputs of them all for each token, on this rank."""
    head: tuple[int, int]
    """(outputs, inputs) of the rank's part of the language-model head."""
    attention: int
    """Width of the rank's heads together, summed over blocks."""
    tokens: int
    """Of the micro-batch; the ranks of a tensor group work on the same."""
    sequence: int
    """Tokens that attend to each other."""
    width: int = 2
    """Bytes of an activation."""
    attention_share: float = 1.0
    """Speed of the attention kernel over that of FlashAttention-2."""
    products_again: float = 0.0
    """Share of the blocks' forward products that checkpointing repeats."""
    rest_again: bool = False
    """Whether it repeats what is between them."""
    attention_again: bool = False


def product(outputs: int, inputs: int, tokens: int, chip: Chip, width: int = 2) -> float:
    """Seconds of one product of (tokens, inputs) with (inputs, outputs)."""
    padded = [math.ceil(side / TILE) * TILE for side in (tokens, outputs, inputs)]
    arithmetic = 2.0 * math.prod(padded) / (chip.peak * chip.reach.matrix)
    moved = width * (tokens * inputs + inputs * outputs + tokens * outputs)
    return max(arithmetic, moved / chip.bandwidth)


def _products(work: Work, chip: Chip, backward: bool) -> tuple[float, float]:
    """(of all blocks, of the head): forward, or the two products of each that the backward pass makes."""

    def both(outputs: int, inputs: int) -> float:
        if not backward:
            return product(outputs, inputs, work.tokens, chip, work.width)
        return product(inputs, outputs, work.tokens, chip, work.width) + product(
            outputs, work.tokens, inputs, chip, work.width
        )

    return sum(count * both(*shape) for shape, count in work.matrices.items()), both(*work.head)


def _between(work: Work, chip: Chip) -> tuple[float, float]:
    """Seconds of everything between products, forward and backward: (of all blocks, of the head)."""
    byte = PASSES * work.width * work.tokens / chip.bandwidth
    return byte * work.between, byte * sum(work.head)


def micro_batch(work: Work, chip: Chip) -> tuple[float, float]:
    """Seconds of one micro-batch on one GPU: (forward, backward with what checkpointing repeats)."""
    blocks, head = _products(work, chip, backward=False)
    blocks_back, head_back = _products(work, chip, backward=True)
    between, between_head = _between(work, chip)
    # QK^T and PV, 2 FLOPs each, over the half of the square below the diagonal
    scores = (
        2.0 * work.attention * work.sequence * work.tokens / (chip.peak * chip.reach.attention * work.attention_share)
    )
    passed = FORWARD_PASSES * between
    forward = blocks + head + scores + passed + FORWARD_PASSES * between_head
    backward = blocks_back + head_back + BACKWARD_ATTENTION * scores
    backward += (1 - FORWARD_PASSES) * (between + between_head)
    again = work.products_again * blocks + work.rest_again * passed + work.attention_again * scores
    return forward, backward + again
