"""Time of a step from a roofline: arithmetic at an assumed share of the peak, and what communication it cannot hide.

An estimate for choosing between layouts, not a measurement. The assumptions are `ASSUMED_MFU`, `LINK_SHARE`,
`GPUS_PER_NODE` and `NETWORK_BYTES`, and the first is a user's to replace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nexa.hardware import Gpu, peak_of
from nexa.model.init import layer_index
from nexa.scaling.layout import Layout, Sizes, sizes
from nexa.scaling.trace import Tracer

ASSUMED_MFU = ((1024, 0.20), (2048, 0.30), (4096, 0.40), (1 << 30, 0.45))
"""(hidden sizes below, model FLOP/s over the peak): narrow matrices leave a GPU idle. An assumption, not measured."""
LINK_SHARE = 0.7
"""Assumed share of a link's data sheet bandwidth that collectives reach."""
GPUS_PER_NODE = 8
NETWORK_BYTES = 50e9
"""Assumed bytes per second and direction between nodes, for each GPU: one 400 Gb/s port."""
UPDATE_BYTES = 40
"""Memory traffic of clipping and AdamW for each element of a rank's share: reads and writes in fp32."""
BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Machine:
    """The GPUs of a plan, and how fast they are thought to work."""

    gpu: Gpu
    mfu: float | None = None
    """Share of the peak that the model's arithmetic reaches; None is `ASSUMED_MFU`."""
    network: float = NETWORK_BYTES
    """Bytes per second and direction between nodes, for each GPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what they are made of."""

    compute: float
    update: float
    data: float
    """Reduction of gradients and gathering of weights that nothing hides."""
    tensor: float
    """Tensor parallelism: nothing hides it."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.update + self.data + self.tensor


def assumed_mfu(hidden_size: int) -> float:
    """The row of `ASSUMED_MFU` for a model's width."""
    return next(share for below, share in ASSUMED_MFU if hidden_size < below)


def flops(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> tuple[float, float]:
    """FLOPs of one token: (training as `nexa.model.decoder.flops_per_token` counts it, recomputation).

    shapes: of the whole parameters. Full checkpointing repeats the forward pass of all blocks; selective repeats no
    matrix product.
    """
    model = layout.cfg.model
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) == 2}
    in_blocks = sum(count for name, count in matrices.items() if layer_index(name) is not None)
    table = matrices["model.embed_tokens.weight"]
    others = sum(matrices.values()) - in_blocks - (0 if model.tie_word_embeddings else table)
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    scores = 4 * model.num_hidden_layers * model.num_attention_heads * head_dim * layout.cfg.data.sequence_length
    forward = 2.0 * in_blocks + scores
    recomputed = forward if layout.cfg.train.activation_checkpointing == "full" else 0.0
    return 3 * (forward + 2.0 * others), recomputed


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in a step, for ring collectives."""

    hidden: float
    """In the data-parallel group, beside the arithmetic."""
    exposed: float
    """In the data-parallel group, with nothing else to do."""
    tensor: float


def traffic(layout: Layout, count: Sizes) -> Traffic:
    """Communication of one rank in a step.

    Ring collectives of n bytes over r ranks send 2 (r-1)/r n for an all-reduce and half of it for a reduce-scatter or
    an all-gather. Gradients travel in fp32, as the engine asks, weights in the working precision.
    """
    cfg, total = layout.cfg, count.total
    ring = (layout.data - 1) / layout.data
    reductions = layout.accumulation if layout.stage >= 2 else 1
    if layout.stage < 3:
        hidden = reductions * 2 * ring * total * 4
        exposed = ring * total * layout.width if layout.stage else 0.0
    else:
        hidden = layout.accumulation * ring * total * (4 + 2 * layout.width)
        exposed = 0.0
    cut = (layout.tensor - 1) / layout.tensor
    stream = layout.tokens * cfg.model.hidden_size * layout.width
    # forward and backward all-reduce after attention and feed-forward, or gathers and scatters of the same volume;
    # recomputing repeats the forward ones, also where it keeps the matrix products
    passes = 8 + 4 * (cfg.train.activation_checkpointing != "none")
    ends = 4
    each = (passes * cfg.model.num_hidden_layers + ends) * stream * cut
    return Traffic(hidden, exposed, each * layout.accumulation)


def step_time(layout: Layout, machine: Machine, tracer: Tracer) -> tuple[StepTime | None, str]:
    """(time of a step, how it was estimated); (None, why not) when the device's figures are not known."""
    cfg, gpu = layout.cfg, machine.gpu
    peak, source = peak_of(gpu.device, cfg.train.precision)
    if peak is None:
        return None, source
    count, spans = sizes(cfg, tracer.shapes, layout.tensor), layout.world > GPUS_PER_NODE
    needs_link = layout.tensor > 1 or (layout.data > 1 and not spans)
    if needs_link and gpu.link is None:
        return None, f"the bandwidth between {gpu.name}s of one node depends on the machine"
    mfu = machine.mfu or assumed_mfu(cfg.model.hidden_size)
    tokens = cfg.train.global_batch_size * cfg.data.sequence_length / layout.world
    model, recomputed = flops(layout, tracer.shapes)
    compute = tokens * (model + recomputed) / (peak * mfu)
    sent = traffic(layout, count)
    link = LINK_SHARE * (gpu.link or 0.0)
    across = LINK_SHARE * machine.network if spans else link
    hidden, exposed = (sent.hidden / across, sent.exposed / across) if layout.data > 1 else (0.0, 0.0)
    # stages 0 and 1 reduce once, in the last micro-batch's backward pass; stage 0 does it after that
    cover = compute if layout.stage == 3 else compute * BACKWARD_SHARE
    if layout.stage == 1:
        cover /= layout.accumulation
    if layout.stage == 0:
        cover = 0.0
    share = count.total / (layout.data if layout.stage else 1)
    return StepTime(
        compute=compute,
        update=UPDATE_BYTES * share / gpu.bandwidth,
        data=max(0.0, hidden - cover) + exposed,
        tensor=sent.tensor / link if layout.tensor > 1 else 0.0,
    ), f"{source}, at {mfu:.0%} of it ({'given' if machine.mfu else 'assumed for this width'})"
