"""Where norms stand: one row per placement, read by the block, which knows no placement's name.

A sublayer f (attention or feed-forward) of a block maps the residual stream x to

    y = M_res( skip_scale * x + branch_scale * M_out( f( input_scale * M_in(x) ) ) )

where each M is a norm or absent. A placement says, for each block (counted from 0 over the whole
model, whatever part of it a process holds), which norms there are and which fixed scales.
Adding a placement is one row of `PLACEMENTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from nexa.config.schema import NormConfig


@dataclass(frozen=True)
class SublayerPlan:
    """Norm sites and fixed scales around one sublayer."""

    input: bool = False
    output: bool = False
    residual: bool = False
    input_scale: float = 1.0
    skip_scale: float = 1.0
    branch_scale: float = 1.0
    """What the sublayer's result is multiplied with; the initial value where that is learned."""
    learned_scale: str = ""
    """`scalar` or `vector`: `branch_scale` is a parameter [1] or [d]; empty: it is fixed."""
    output_gain: float = 1.0
    """Factor on the initial weight of the output norm, which is 1 for most kinds."""


@dataclass(frozen=True)
class BlockPlan:
    """One block: its two sublayers and the norms inside them."""

    attn: SublayerPlan
    mlp: SublayerPlan
    head_norms: tuple[str, ...] = ()
    """Which of q, k, v carry a per-head RMSNorm."""
    head_scale: Literal["", "heads", "output"] = ""
    """Learnable scale of each head before the output projection, or of as many pieces of its output."""
    mid_norm: bool = False
    """Norm of the feed-forward's hidden activations."""

    @property
    def pairs_inputs(self) -> bool:
        """Whether attention reads a norm of the stream x, adds W_O W_V and an average over tokens of it to x as it is,
        and the feed-forward reads a norm of that sum: what BHyT's second norm knows the variance of."""
        attn = self.attn
        touched = attn.output or attn.residual or attn.learned_scale or self.head_norms or self.head_scale
        return attn.input and self.mlp.input and attn.branch_scale == 1.0 and not touched


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


def takes_depth_numbers(norm: NormConfig) -> bool:
    """Whether blocks have a scale by their number."""
    return norm.placement == "lns" or norm.depth_scaling


def depth_number(norm: NormConfig, index: int) -> int:
    """Number l of block `index` in 1/sqrt(l)."""
    return index + 1 if norm.depth_numbers is None else norm.depth_numbers[index]


def _lns_scale(site: Site) -> float:
    """LayerNorm Scaling: 1/sqrt(l) for block l, counted from 1 over the whole model (arXiv 2502.05795, equation 5)."""
    return 1 / math.sqrt(depth_number(site.norm, site.index))


def _lns(site: Site) -> BlockPlan:
    """Both norms of a Pre-LN block scaled."""
    scaled = SublayerPlan(input=True, input_scale=_lns_scale(site))
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
    "normformer": Row(lambda site: BlockPlan(_IN_OUT, _IN, head_scale=site.norm.head_scale, mid_norm=True)),
    "none": Row(lambda site: BlockPlan(SublayerPlan(), SublayerPlan()), final=False),
}


@dataclass(frozen=True)
class BranchScale:
    """A row of `BRANCH_SCALES`: the (initial) factor from the number of blocks, and whether it is learned."""

    value: Callable[[int], float]
    learned: str = ""


def _layer_scale(layers: int) -> float:
    """Initial LayerScale by depth, as in CaiT (arXiv 2103.17239, section 2)."""
    return 0.1 if layers <= 18 else 1e-5 if layers <= 24 else 1e-6


BRANCH_SCALES: dict[str, BranchScale] = {
    "none": BranchScale(lambda layers: 1.0),
    "fixed": BranchScale(lambda layers: (2 * layers) ** -0.5),
    "skip_init": BranchScale(lambda layers: layers**-0.5, "scalar"),
    "layer_scale": BranchScale(_layer_scale, "vector"),
}
"""Values of `norm.branch_scale`, which go with every placement: 1/sqrt(2L) for the 2L sublayers (Stable ResNet, arXiv
2010.12859); SkipInit with 1/sqrt(L) as in the LayerNorm Scaling paper (De and Smith, arXiv 2002.10444, start at 0);
LayerScale (arXiv 2103.17239)."""


def block_plans(norm: NormConfig, layers: int) -> list[BlockPlan]:
    """The plan of every block, in order."""
    row = PLACEMENTS[norm.placement]
    sites = [Site(index, layers, norm) for index in range(layers)]
    return [_with_options(row.block(site), site) for site in sites]


def _with_options(plan: BlockPlan, site: Site) -> BlockPlan:
    """Add what can be combined with every placement."""
    scale = BRANCH_SCALES[site.norm.branch_scale]
    given = site.norm.branch_scale_value
    value = scale.value(site.layers) if given is None else given

    def sublayer(one: SublayerPlan) -> SublayerPlan:
        if site.norm.depth_scaling and one.input:
            one = replace(one, input_scale=_lns_scale(site))
        return replace(one, branch_scale=value, learned_scale=scale.learned)

    return replace(plan, attn=sublayer(plan.attn), mlp=sublayer(plan.mlp))


def has_final_norm(norm: NormConfig) -> bool:
    """Whether there is a norm before the head."""
    return PLACEMENTS[norm.placement].final if norm.final is None else norm.final
