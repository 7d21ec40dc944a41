"""Where norms stand: one row per placement, read by the block, which knows no placement's name.

A sublayer f (attention or feed-forward) of a block maps the residual stream x to

    y = M_res( skip_scale * x + M_out( f( input_scale * M_in(x) ) ) )

where each M is a norm or absent. A placement says, for each block (counted from 0 over the whole
model, whatever part of it a process holds), which norms there are and which fixed scales.
Adding a placement is one row of `PLACEMENTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from nexa.config.schema import NormConfig


@dataclass(frozen=True)
class SublayerPlan:
    """Norm sites and fixed scales around one sublayer."""

    input: bool = False
    output: bool = False
    residual: bool = False
    input_scale: float = 1.0
    skip_scale: float = 1.0
    output_gain: float = 1.0
    """Factor on the initial weight of the output norm, which is 1 for most kinds."""


@dataclass(frozen=True)
class BlockPlan:
    """One block: its two sublayers and the norms inside them."""

    attn: SublayerPlan
    mlp: SublayerPlan
    head_norms: tuple[str, ...] = ()
    """Which of q, k, v carry a per-head RMSNorm."""
    head_scale: bool = False
    """Learnable scale per head before the output projection."""
    mid_norm: bool = False
    """Norm of the feed-forward's hidden activations."""


@dataclass(frozen=True)
class Site:
    """What a row may depend on: the block's index, the number of blocks and the norm settings."""

    index: int
    layers: int
    norm: NormConfig


@dataclass(frozen=True)
class Row:
    """One placement."""

    block: Callable[[Site], BlockPlan]
    final: bool = True
    """Norm before the head unless `norm.final` says otherwise."""
    matrix_gain: Callable[[str, int], float] = lambda role, layers: 1.0
    """Factor on the initial standard deviation of a matrix, from its role and the number of blocks."""


_IN = SublayerPlan(input=True)
_RES = SublayerPlan(residual=True)
_OUT = SublayerPlan(output=True)
_IN_OUT = SublayerPlan(input=True, output=True)
_PRE = BlockPlan(_IN, _IN)
_POST = BlockPlan(_RES, _RES)
_QKV = ("q", "k", "v")
_HYBRID = BlockPlan(_RES, SublayerPlan(), head_norms=_QKV)


def post_layers(norm: NormConfig, layers: int) -> int:
    """Blocks of Mix-LN that are Post-LN: `mix_post_layers`, else floor(alpha L) (arXiv 2412.13795)."""
    return math.floor(norm.mix_alpha * layers + 1e-9) if norm.mix_post_layers is None else norm.mix_post_layers


def _mix(site: Site) -> BlockPlan:
    return _POST if site.index < post_layers(site.norm, site.layers) else _PRE


def _lns(site: Site) -> BlockPlan:
    """LayerNorm Scaling, 1/sqrt(l) with l from 1 after both block norms (arXiv 2502.05795, equation 5)."""
    scaled = SublayerPlan(input=True, input_scale=1 / math.sqrt(site.index + 1))
    return BlockPlan(scaled, scaled)


def _hybrid_star(site: Site) -> BlockPlan:
    """HybridNorm* changes the first block only (arXiv 2503.04598): Pre-LN with q, k, v norms."""
    return BlockPlan(_IN, _IN, head_norms=_QKV) if site.index == 0 else _HYBRID


def _deepnorm(site: Site) -> BlockPlan:
    """alpha = (2L)^(1/4) on the skip path of a decoder (arXiv 2203.00555, table 2)."""
    alpha = site.norm.deepnorm_alpha
    plan = SublayerPlan(residual=True, skip_scale=(2 * site.layers) ** 0.25 if alpha is None else alpha)
    return BlockPlan(plan, plan)


def _deepnorm_gain(role: str, layers: int) -> float:
    """beta = (8L)^(-1/4) on v, o and the feed-forward; q and k keep gain 1. The gate, which the paper
    does not have, is treated as the other feed-forward inputs."""
    return (8 * layers) ** -0.25 if role in {"v", "o", "gate", "up", "down"} else 1.0


def _dssn(site: Site) -> BlockPlan:
    """Depth-scaled sandwich norm (Pangu Ultra): output gains start at c/sqrt(L)."""
    root = math.sqrt(site.layers)
    return BlockPlan(
        SublayerPlan(input=True, output=True, output_gain=0.283 / root),
        SublayerPlan(input=True, output=True, output_gain=0.432 / root),
    )


PLACEMENTS: dict[str, Row] = {
    "pre": Row(lambda site: _PRE),
    "post": Row(lambda site: _POST),
    "mix": Row(_mix),
    "peri": Row(lambda site: BlockPlan(_IN_OUT, _IN_OUT)),
    "sandwich": Row(lambda site: BlockPlan(_IN_OUT, _IN_OUT)),
    "dssn": Row(_dssn),
    "reordered": Row(lambda site: BlockPlan(_OUT, _OUT)),
    "hybrid": Row(lambda site: _HYBRID),
    "hybrid_star": Row(_hybrid_star),
    "lns": Row(_lns),
    "deepnorm": Row(_deepnorm, final=False, matrix_gain=_deepnorm_gain),
    "normformer": Row(lambda site: BlockPlan(_IN_OUT, _IN, head_scale=True, mid_norm=True)),
    "none": Row(lambda site: BlockPlan(SublayerPlan(), SublayerPlan()), final=False),
}


def block_plans(norm: NormConfig, layers: int) -> list[BlockPlan]:
    """The plan of every block, in order."""
    row = PLACEMENTS[norm.placement]
    return [row.block(Site(index, layers, norm)) for index in range(layers)]


def has_final_norm(norm: NormConfig) -> bool:
    """Whether there is a norm before the head."""
    return PLACEMENTS[norm.placement].final if norm.final is None else norm.final
