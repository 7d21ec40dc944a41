"""A decoder block: attention and feed-forward, with norms where the plan puts them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.attention import AttentionContext, SelfAttention
from nexa.model.bounded import BHyT
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
        self.paired = make.kind.paired and plan.pairs_inputs
        self.tokens = norm.bhyt_tokens or model.max_position_embeddings
        self.input_layernorm = make("attention") if plan.attn.input else None
        self.self_attn = SelfAttention(model, norm, plan, make.eps, layers)
        self.attn_norm = _site_norms("attention", plan.attn, make)
        self.post_attention_layernorm = make("feed_forward") if plan.mlp.input else None
        mid_norm = make("feed_forward", layers.features(model.intermediate_size)) if plan.mid_norm else None
        self.mlp = FeedForward(model, layers, mid_norm)
        if norm.residual_gain:
            self.mlp.residual_gain = nn.Parameter(torch.ones(model.hidden_size))
        self.mlp_norm = _site_norms("feed_forward", plan.mlp, make)
        self.attn_scale = _learned_scale(plan.attn, model.hidden_size)
        self.mlp_scale = _learned_scale(plan.mlp, model.hidden_size)

    def forward(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Residual stream [B, T, d], or a share of its tokens [tokens, d], to the same."""
        first, second = self._variances(x) if self.paired else (None, None)
        y = self.self_attn(_enter(x, self.plan.attn, self.input_layernorm, first), context)
        x = _leave(x, y, self.plan.attn, self.attn_norm, self.attn_scale, None)
        y = self.mlp(_enter(x, self.plan.mlp, self.post_attention_layernorm, second))
        return _leave(x, y, self.plan.mlp, self.mlp_norm, self.mlp_scale, getattr(self.mlp, "residual_gain", None))

    def _variances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squares [..., 1] that the norms before attention and feed-forward take for those of what they read."""
        norm = self.input_layernorm
        assert isinstance(norm, BHyT)
        first = norm.variance(x)
        return first, norm.second_variance(first, self.self_attn.value_gain(), self.tokens, self.plan.attn.input_scale)

    def borrowed(self) -> list[nn.Parameter]:
        """Parameters of its parts that its own forward pass reads: ZeRO-3 must gather them for it, too."""
        if not self.paired:
            return []
        attention, norm = self.self_attn, self.input_layernorm
        found = [attention.v_proj.weight, attention.o_proj.weight, getattr(norm, "lambda")]
        return [parameter for parameter in found if isinstance(parameter, nn.Parameter)]


def _site_norms(part: Part, plan: SublayerPlan, make: NormBuilder) -> nn.ModuleDict:
    norms = nn.ModuleDict()
    if plan.output:
        norms["output"] = make(part, gain=plan.output_gain)
    if plan.residual:
        norms["residual"] = make(part)
    return norms


def _learned_scale(plan: SublayerPlan, width: int) -> nn.Parameter | None:
    sizes = {"scalar": 1, "vector": width}
    if not plan.learned_scale:
        return None
    return nn.Parameter(torch.full((sizes[plan.learned_scale],), plan.branch_scale))


def _enter(x: Tensor, plan: SublayerPlan, norm: nn.Module | None, variance: Tensor | None) -> Tensor:
    """What the sublayer reads; `variance` for the norm, unless it takes its own."""
    y = x if norm is None else norm(x) if variance is None else norm(x, variance)
    return y if plan.input_scale == 1.0 else y * plan.input_scale


def _leave(
    x: Tensor, y: Tensor, plan: SublayerPlan, norms: nn.ModuleDict, scale: Tensor | None, gain: Tensor | None
) -> Tensor:
    """Join the sublayer's result `y` to the residual stream `x`."""
    if plan.output:
        y = norms["output"](y)
    if scale is not None or plan.branch_scale != 1.0:
        y = y * (plan.branch_scale if scale is None else scale)
    skip = x if plan.skip_scale == 1.0 else x * plan.skip_scale
    joined = (skip if gain is None else skip * gain) + y
    return norms["residual"](joined) if plan.residual else joined
