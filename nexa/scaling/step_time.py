"""Time of a step: what its arithmetic takes (`compute`), and the communication (`collectives`) it cannot hide.

An estimate for choosing between layouts and sizes of cluster, not a measurement; docs/simulate.md compares it with
published measurements and lists what was assumed and what was fitted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from nexa.hardware import Gpu, peak_of
from nexa.model.init import layer_index, role_of
from nexa.scaling.collectives import Group, Network, data_group, seconds, tensor_group
from nexa.scaling.compute import Chip, Work, architecture_of, micro_batch, reach_of
from nexa.scaling.layout import SPLIT_DIMENSION, Layout, Sizes, local_shape, sizes
from nexa.scaling.reliability import expected_maximum
from nexa.scaling.trace import Tracer

GPUS_PER_NODE = 8
NETWORK_BYTES = 50e9
"""Assumed bytes per second and direction between nodes, for each GPU: one 400 Gb/s port."""
UPDATE_BYTES = 40
"""Memory traffic of clipping and AdamW for each element of a rank's share: reads and writes in fp32."""
COPIES = 6.4
"""Reads and writes of a GPU's memory for each byte that data parallelism gathers or reduces: copies into and out of
flat buffers, and the collective's own. They slow the arithmetic beside them. Calibrated: docs/simulate.md."""
VARIATION = 0.01
"""Assumed standard deviation of a rank's time for the arithmetic of a step, over the mean."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a plan, and how fast they are thought to work."""

    gpu: Gpu
    mfu: float | None = None
    """Share of the peak that the model's arithmetic reaches; None works it out from the shapes."""
    network: float = NETWORK_BYTES
    """Bytes per second and direction between nodes, for each GPU."""
    node: int = GPUS_PER_NODE
    """GPUs of a node."""
    variation: float = VARIATION
    """Standard deviation of a rank's time for the arithmetic of a step, over the mean."""

    def levels(self) -> Network:
        """The network as collectives see it."""
        return Network(self.gpu.link, self.network, self.node)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, and what they are made of."""

    compute: float
    update: float
    reduce: float = 0.0
    """Reduction of gradients that nothing hides."""
    gather: float = 0.0
    """Gathering of weights that nothing hides."""
    tensor: float = 0.0
    """Tensor parallelism: nothing hides it."""
    straggler: float = 0.0
    """Waiting for the slowest rank."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.compute + self.update + self.reduce + self.gather + self.tensor + self.straggler

    @property
    def data(self) -> float:
        """Communication of data parallelism that nothing hides."""
        return self.reduce + self.gather


@dataclass(frozen=True)
class Strategy:
    """How ranks share the work of a step, in numbers."""

    data: int
    tensor: int
    stage: int
    """ZeRO stage."""
    accumulation: int
    """Micro-batches of a rank in a step."""
    elements: float
    """Parameters of one tensor rank, before ZeRO shards them."""
    pieces: int
    """Collectives in which they are gathered or reduced: blocks, or buckets."""
    stream: float = 0.0
    """Bytes of the residual stream of one micro-batch, which tensor parallelism gathers and scatters."""
    passes: int = 0
    """Gathers, scatters, and halves of all-reduces of it in a micro-batch."""
    sequence: bool = False
    """Whether they are gathers and scatters (sequence parallelism) or all-reduces."""
    width: int = 2
    """Bytes of a gathered weight."""
    reduce_width: int = 4
    """Bytes of a reduced gradient: nexa reduces in fp32."""
    early_gather: bool = field(default=False, kw_only=True)
    """Whether stages 1 and 2 gather weights beside the forward pass; nexa gathers them at the end of the update."""


def tensor_passes(layers: int, again: bool) -> int:
    """Gathers and scatters, or halves of all-reduces, of the residual stream in a micro-batch.

    One on entering and one on leaving attention and feed-forward, in both directions, and 4 at the model's ends;
    checkpointing repeats the forward ones, also where it keeps the matrix products.
    """
    return (8 + 4 * again) * layers + 4


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


def work_of(layout: Layout, shapes: Mapping[str, tuple[int, ...]]) -> Work:
    """What one rank of `layout` computes for a micro-batch; shapes: of the whole parameters."""
    cfg, model, tensor = layout.cfg, layout.cfg.model, layout.tensor
    kv_heads = model.num_key_value_heads or model.num_attention_heads
    found: Counter[tuple[int, int]] = Counter()
    between = 0.0
    for name, shape in shapes.items():
        if len(shape) == 2 and layer_index(name) is not None:
            local = local_shape(name, shape, tensor, kv_heads)
            found[local[0], local[1]] += 1
            cut = SPLIT_DIMENSION.get(role_of(name) or "")
            between += sum(side if dim == cut else side / layout.sequence_shards for dim, side in enumerate(local))
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    full = cfg.train.activation_checkpointing == "full"
    return Work(
        matrices=found,
        between=between,
        head=(math.ceil(model.vocab_size / tensor), model.hidden_size),
        attention=model.num_hidden_layers * model.num_attention_heads * head_dim // tensor,
        tokens=layout.tokens,
        sequence=cfg.data.sequence_length,
        width=layout.width,
        products_again=float(full),
        rest_again=cfg.train.activation_checkpointing != "none",
        attention_again=full,
    )


def strategy_of(layout: Layout, count: Sizes) -> Strategy:
    """What the engine does with `layout`; `count` of one tensor rank."""
    cfg = layout.cfg
    stream = layout.tokens * cfg.model.hidden_size * layout.width
    buckets = math.ceil(count.total / layout.bucket)
    return Strategy(
        data=layout.data,
        tensor=layout.tensor,
        stage=layout.stage,
        accumulation=layout.accumulation,
        elements=count.total,
        pieces=cfg.model.num_hidden_layers + 2 if layout.stage == 3 else buckets,
        stream=stream,
        passes=tensor_passes(cfg.model.num_hidden_layers, cfg.train.activation_checkpointing != "none"),
        sequence=cfg.parallel.sequence,
        width=layout.width,
    )


def _in_pieces(kind: str, size: float, pieces: int, group: Group, network: Network) -> float:
    return pieces * seconds(kind, size / pieces, group, network)


def data_time(strategy: Strategy, forward: float, backward: float, network: Network) -> tuple[float, float]:
    """Seconds of a step in which data parallelism keeps a rank waiting: (reducing gradients, gathering weights).

    forward, backward: seconds of one micro-batch's arithmetic. Stage 0 reduces after the last micro-batch, stage 1
    beside its backward pass, stages 2 and 3 beside every backward pass; stages 1 and 2 gather weights after the
    update, stage 3 beside every forward and backward pass. The first piece that a pass waits for is never hidden.
    """
    s, group = strategy, data_group(strategy.data, strategy.tensor, network)
    if s.data == 1:
        return 0.0, 0.0
    kind = "all_reduce" if s.stage == 0 else "reduce_scatter"
    reduce = _in_pieces(kind, s.elements * s.reduce_width, s.pieces, group, network)
    if s.stage == 0:
        return reduce, 0.0
    gather = _in_pieces("all_gather", s.elements * s.width, s.pieces, group, network)

    def beside(work: float, time: float) -> float:
        return max(time - work, time / s.pieces)

    if s.stage < 3:
        times = s.accumulation if s.stage == 2 else 1
        return times * beside(backward, reduce), beside(forward, gather) if s.early_gather else gather
    # gathers of the backward pass come first: what does not fit beside it is the reductions' share
    gathered = beside(forward, gather) + beside(backward, gather)
    reduced = beside(max(0.0, backward - gather), reduce)
    return s.accumulation * reduced, s.accumulation * gathered


def data_bytes(strategy: Strategy) -> float:
    """Bytes that data parallelism gathers and reduces on one rank in a step."""
    s = strategy
    if s.data == 1:
        return 0.0
    gathers = 0 if s.stage == 0 else 1 if s.stage < 3 else 2 * s.accumulation
    reductions = s.accumulation if s.stage >= 2 else 1
    return s.elements * (gathers * s.width + reductions * s.reduce_width)


def tensor_time(strategy: Strategy, network: Network) -> float:
    """Seconds of a step that tensor parallelism takes."""
    s = strategy
    if s.tensor == 1:
        return 0.0
    kinds = [("all_gather", s.passes)] if s.sequence else [("all_reduce", s.passes // 2)]
    group = tensor_group(s.tensor, network)
    return s.accumulation * sum(times * seconds(kind, s.stream, group, network) for kind, times in kinds)


def time_of(
    strategy: Strategy, passes: tuple[float, float], bandwidth: float, network: Network, variation: float = VARIATION
) -> StepTime:
    """Time of a step from numbers alone.

    passes: seconds of the arithmetic of one micro-batch, forward and backward; bandwidth: bytes per second of a GPU's
    memory; variation: standard deviation of a rank's arithmetic over its mean.

    Raises:
        ValueError: GPUs of one node talk and the bandwidth between them is not known.
    """
    s = strategy
    compute = s.accumulation * sum(passes) + COPIES * data_bytes(s) / bandwidth
    reduce, gather = data_time(s, *passes, network)
    return StepTime(
        compute=compute,
        update=UPDATE_BYTES * s.elements / (s.data if s.stage else 1) / bandwidth,
        reduce=reduce,
        gather=gather,
        tensor=tensor_time(s, network),
        straggler=compute * variation * expected_maximum(s.data * s.tensor),
    )


def step_time(layout: Layout, machine: Machine, tracer: Tracer) -> tuple[StepTime | None, str]:
    """(time of a step, how it was estimated); (None, why not) when the device's figures are not known."""
    cfg, gpu = layout.cfg, machine.gpu
    peak, source = peak_of(gpu.device, cfg.train.precision)
    if peak is None:
        return None, source
    network, strategy = machine.levels(), strategy_of(layout, sizes(cfg, tracer.shapes, layout.tensor))
    inside = tensor_group(layout.tensor, network), data_group(layout.data, layout.tensor, network)
    if gpu.link is None and any(group.per_node > 1 for group in inside):
        return None, f"the bandwidth between {gpu.name}s of one node depends on the machine"
    if machine.mfu:
        model, recomputed = flops(layout, tracer.shapes)
        whole = layout.tokens / layout.tensor / (peak * machine.mfu)
        passes = whole * model / 3, whole * (model * 2 / 3 + recomputed)
    else:
        passes = micro_batch(work_of(layout, tracer.shapes), Chip(peak, gpu.bandwidth, reach_of(gpu.name)))
    found = time_of(strategy, passes, gpu.bandwidth, network, machine.variation)
    reached = (
        layout.accumulation * layout.tokens / layout.tensor * flops(layout, tracer.shapes)[0] / peak / found.compute
    )
    how = "given" if machine.mfu else f"from the shapes, with the shares of {architecture_of(gpu.name)}"
    return found, f"{source}, at {reached:.0%} of it ({how})"
