"""A decoder block: attention and feed-forward, with norms where the plan puts them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.attention import AttentionContext, SelfAttention
from nexa.model.feed_forward import FeedForward
from nexa.model.kinds import NormBuilder
from nexa.model.layers import Layers
from nexa.model.norms import Part
from nexa.model.placement import BlockPlan, SublayerPlan


class Block(nn.Module):
    """Block `index` of the model, built from its row of the placement table."""

    def __init__(
        self, model: ModelConfig, norm: NormConfig, plan: BlockPlan, make: NormBuilder, layers: Layers
    ) -> None:
        super().__init__()
        self.plan = plan
        self.input_layernorm = make("attention") if plan.attn.input else None
        self.self_attn = SelfAttention(model, norm, plan, make.eps, layers)
        self.attn_norm = _site_norms("attention", plan.attn, make)
        self.post_attention_layernorm = make("feed_forward") if plan.mlp.input else None
        mid_norm = make("feed_forward", layers.features(model.intermediate_size)) if plan.mid_norm else None
        self.mlp = FeedForward(model, layers, mid_norm)
        if norm.residual_gain:
            self.mlp.residual_gain = nn.Parameter(torch.ones(model.hidden_size))
        self.mlp_norm = _site_norms("feed_forward", plan.mlp, make)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Residual stream [B, T, d], or a share of its tokens [tokens, d], to the same."""
        y = self.self_attn(_enter(x, self.plan.attn, self.input_layernorm), context)
        x = _leave(x, y, self.plan.attn, self.attn_norm, None)
        y = self.mlp(_enter(x, self.plan.mlp, self.post_attention_layernorm))
        return _leave(x, y, self.plan.mlp, self.mlp_norm, getattr(self.mlp, "residual_gain", None))


def _site_norms(part: Part, plan: SublayerPlan, make: NormBuilder) -> nn.ModuleDict:
    norms = nn.ModuleDict()
    if plan.output:
        norms["output"] = make(part, gain=plan.output_gain)
    if plan.residual:
        norms["residual"] = make(part)
    return norms


def _enter(x: Tensor, plan: SublayerPlan, norm: nn.Module | None) -> Tensor:
    """What the sublayer reads."""
    y = x if norm is None else norm(x)
    return y if plan.input_scale == 1.0 else y * plan.input_scale


def _leave(x: Tensor, y: Tensor, plan: SublayerPlan, norms: nn.ModuleDict, gain: Tensor | None) -> Tensor:
    """Join the sublayer's result `y` to the residual stream `x`."""
    if plan.output:
        y = norms["output"](y)
    skip = x if plan.skip_scale == 1.0 else x * plan.skip_scale
    joined = (skip if gain is None else skip * gain) + y
    return norms["residual"](joined) if plan.residual else joined
