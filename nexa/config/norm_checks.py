"""Rules between keys of the norms: which placements, kinds and options go together. See `checks`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nexa.config.fields import shorten
from nexa.config.rules import Check, multiples, reads
from nexa.config.schema import Config

NORM_CHECKS: list[Check] = []
_reads = partial(reads, NORM_CHECKS)


@_reads("norm.placement", "norm.mix_post_layers", "model.num_hidden_layers")
def _mix_layers(cfg: Config, world_size: int | None) -> Iterator[str]:
    layers, post = cfg.model.num_hidden_layers, cfg.norm.mix_post_layers
    if post is not None and post > layers:
        yield f"norm.mix_post_layers={post}: at most model.num_hidden_layers={layers}"
    elif post is not None and cfg.norm.placement != "mix":
        yield f"norm.mix_post_layers={post}: only norm.placement=mix has it, not {cfg.norm.placement}; set it to null"


@_reads("norm.placement", "norm.qk")
def _qk_once(cfg: Config, world_size: int | None) -> Iterator[str]:
    if cfg.norm.qk != "none" and cfg.norm.placement in ("hybrid", "hybrid_star"):
        yield (
            f"norm.qk={cfg.norm.qk}: norm.placement={cfg.norm.placement} already normalises queries, keys and values; "
            "set norm.qk=none"
        )


@_reads("norm.placement", "norm.residual_gain", "norm.deepnorm_alpha")
def _placement_own(cfg: Config, world_size: int | None) -> Iterator[str]:
    if cfg.norm.residual_gain and cfg.norm.placement != "normformer":
        yield (
            f"norm.residual_gain=true: only norm.placement=normformer has it, not {cfg.norm.placement}; "
            "set norm.residual_gain=false"
        )
    if cfg.norm.deepnorm_alpha is not None and cfg.norm.placement != "deepnorm":
        yield (
            f"norm.deepnorm_alpha={cfg.norm.deepnorm_alpha}: only norm.placement=deepnorm has it, "
            f"not {cfg.norm.placement}; set norm.deepnorm_alpha=null"
        )


@_reads("norm.placement", "norm.head_scale", "model.hidden_size", "model.num_attention_heads")
def _head_scale(cfg: Config, world_size: int | None) -> Iterator[str]:
    size, heads = cfg.model.hidden_size, cfg.model.num_attention_heads
    if cfg.norm.head_scale != "output":
        return
    if cfg.norm.placement != "normformer":
        yield (
            f"norm.head_scale=output: only norm.placement=normformer scales heads, not {cfg.norm.placement}; "
            "set norm.head_scale=heads"
        )
    elif size % heads and cfg.model.head_dim is not None:
        yield (
            f"norm.head_scale=output: model.hidden_size={size} cannot be cut into as many pieces as there are heads, "
            f"{heads}; set norm.head_scale=heads or model.hidden_size={multiples(size, heads)}"
        )


WITHOUT_STATISTICS = ("dyt", "eln")
"""Kinds that work on each element alone."""
BHYT_PLACEMENTS = ("pre", "lns")
"""Placements all of whose blocks have `BlockPlan.pairs_inputs`."""


@_reads("norm.kind", "norm.pre_affine")
def _pre_affine(cfg: Config, world_size: int | None) -> Iterator[str]:
    kind = cfg.norm.kind
    if cfg.norm.pre_affine and kind in (*WITHOUT_STATISTICS, *RUNNING, "bhyt"):
        why = "knows the variance of the stream, not of this" if kind == "bhyt" else "takes no statistics over features"
        why = "is about statistics over tokens" if kind in RUNNING else why
        yield f"norm.pre_affine=true: norm.kind={kind} {why}; set norm.pre_affine=false"


@_reads("norm.kind", "norm.placement", "norm.bhyt_tokens", "norm.branch_scale", "model.attention_gate")
def _bhyt(cfg: Config, world_size: int | None) -> Iterator[str]:
    kind, placement, gate = cfg.norm.kind, cfg.norm.placement, cfg.model.attention_gate
    if kind != "bhyt":
        if cfg.norm.bhyt_tokens is not None:
            yield f"norm.bhyt_tokens={cfg.norm.bhyt_tokens}: only norm.kind=bhyt has it, not {kind}; set it to null"
        return
    if placement not in BHYT_PLACEMENTS:
        yield (
            f"norm.kind=bhyt, norm.placement={placement}: the norm before the feed-forward takes its variance from the "
            "one before attention, so both must be there and nothing may normalise or scale between them; "
            f"set norm.placement={' or '.join(BHYT_PLACEMENTS)}"
        )
    if gate != "none":
        yield (
            f"model.attention_gate={gate}: norm.kind=bhyt derives the variance after attention from its matrices, "
            "without a gate; set model.attention_gate=none"
        )
    if cfg.norm.branch_scale != "none":
        yield (
            f"norm.branch_scale={cfg.norm.branch_scale}: norm.kind=bhyt derives the variance after attention from its "
            "matrices, without such a factor; set norm.branch_scale=none"
        )


@_reads("norm.kind", "model.fixnorm")
def _one_embedding_scale(cfg: Config, world_size: int | None) -> Iterator[str]:
    if cfg.model.fixnorm and cfg.norm.kind in WITHOUT_STATISTICS:
        yield (
            f"model.fixnorm=true: norm.kind={cfg.norm.kind} already multiplies the embedding by a learnable "
            "sqrt(hidden_size), meant for rows that are not normalised; set model.fixnorm=false"
        )


INPUT_NORMS = ("pre", "lns", "mix", "peri", "sandwich", "dssn", "normformer", "hybrid_star")
"""Placements with a norm before a sublayer."""


@_reads("norm.placement", "norm.depth_scaling")
def _depth_scaling(cfg: Config, world_size: int | None) -> Iterator[str]:
    if cfg.norm.depth_scaling and cfg.norm.placement not in INPUT_NORMS:
        yield (
            f"norm.depth_scaling=true: scales what input norms give, and norm.placement={cfg.norm.placement} has none; "
            f"set norm.depth_scaling=false, or a placement among {', '.join(INPUT_NORMS)}"
        )


@_reads("norm.placement", "norm.depth_scaling", "norm.depth_numbers", "model.num_hidden_layers")
def _depth_numbers(cfg: Config, world_size: int | None) -> Iterator[str]:
    numbers, layers = cfg.norm.depth_numbers, cfg.model.num_hidden_layers
    if numbers is not None and cfg.norm.placement != "lns" and not cfg.norm.depth_scaling:
        yield (
            f"norm.depth_numbers={shorten(numbers)}: norm.placement={cfg.norm.placement} without norm.depth_scaling "
            "scales nothing by the number of a block; set it to null"
        )
    elif numbers is not None and len(numbers) != layers:
        yield (
            f"norm.depth_numbers={shorten(numbers)}: {len(numbers)} numbers for model.num_hidden_layers={layers} "
            "blocks; give one for each, or null"
        )


@_reads("norm.branch_scale", "norm.branch_scale_value")
def _branch_scale(cfg: Config, world_size: int | None) -> Iterator[str]:
    if cfg.norm.branch_scale_value is not None and cfg.norm.branch_scale == "none":
        yield (
            f"norm.branch_scale_value={cfg.norm.branch_scale_value}: norm.branch_scale=none has no such factor; "
            "set norm.branch_scale=fixed, or norm.branch_scale_value=null"
        )
    if cfg.norm.branch_scale_value == 0 and cfg.norm.branch_scale == "fixed":
        yield (
            "norm.branch_scale_value=0.0: a fixed factor of 0 takes every sublayer out for good; "
            "set norm.branch_scale=skip_init to learn it from there, or a value above 0"
        )


RUNNING = ("powernorm", "unifiednorm")
"""Kinds with running statistics."""


@_reads("norm.kind", "norm.warmup_steps", "train.activation_checkpointing", "train.precision")
def _running_norm(cfg: Config, world_size: int | None) -> Iterator[str]:
    norm, recompute = cfg.norm, cfg.train.activation_checkpointing
    if norm.kind not in RUNNING:
        if norm.warmup_steps is not None:
            yield (
                f"norm.warmup_steps={norm.warmup_steps}: norm.kind={norm.kind} has no running statistics to warm up; "
                f"set norm.warmup_steps=null, or norm.kind={' or '.join(RUNNING)}"
            )
        return
    if recompute != "none":
        yield (
            f"train.activation_checkpointing={recompute}: computing a block again would update the running statistics "
            f"of norm.kind={norm.kind} twice; set train.activation_checkpointing=none"
        )
    if cfg.train.precision == "fp16":
        yield (
            f"train.precision=fp16: norm.kind={norm.kind} keeps a running statistic of gradients, which the changing "
            "loss scale would spoil; set train.precision=bf16 or fp32"
        )


REMOVABLE_PLACEMENTS = ("pre", "lns")
"""Placements all of whose norms stand before linear layers, which can take a constant over."""
REMOVABLE_KINDS = ("rmsnorm", "layernorm")
"""Kinds that are linear once their denominator is a constant, and whose denominator is their own."""


@_reads(
    "norm.removal.start",
    "norm.removal.order",
    "norm.placement",
    "norm.kind",
    "norm.pre_affine",
    "norm.final",
)
def _removal(cfg: Config, world_size: int | None) -> Iterator[str]:
    norm, order = cfg.norm, cfg.norm.removal.order
    if norm.removal.start is None:
        return
    start = f"norm.removal.start={norm.removal.start}"
    if norm.placement not in REMOVABLE_PLACEMENTS:
        yield (
            f"{start}: norm.placement={norm.placement} has norms with no linear layer behind them that could take them "
            f"over; set norm.removal.start=null, or norm.placement={' or '.join(REMOVABLE_PLACEMENTS)}"
        )
    if norm.kind not in REMOVABLE_KINDS:
        yield (
            f"{start}: norm.kind={norm.kind} is not linear behind a constant denominator; set norm.removal.start=null, "
            f"or norm.kind={' or '.join(REMOVABLE_KINDS)}"
        )
    if norm.pre_affine:
        yield f"{start}: norm.pre_affine=true has a weight that nothing behind can take over; set norm.pre_affine=false"
    if norm.final is False:
        yield f"{start}: norm.final=false leaves the head without a norm to remove; set norm.final=null"
    if not order or len(set(order)) < len(order):
        yield f"norm.removal.order={order}: must name one or more of feed_forward, attention and final, each once"
