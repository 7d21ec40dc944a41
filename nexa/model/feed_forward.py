"""SwiGLU feed-forward (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nexa.config.schema import ModelConfig
from nexa.model import cpu_linear
from nexa.model.layers import Layers


class FeedForward(nn.Module):
    """down(mid_norm(silu(gate(x)) * up(x)))."""

    def __init__(self, model: ModelConfig, layers: Layers, mid_norm: nn.Module | None = None) -> None:
        super().__init__()
        self._enter = layers.enter
        self.gate_proj = layers.column(model.hidden_size, model.intermediate_size, model.input_bias)
        self.up_proj = layers.column(model.hidden_size, model.intermediate_size, model.input_bias)
        self.down_proj = layers.row(model.intermediate_size, model.hidden_size)
        self.mid_norm = mid_norm

    def choose_kernel(self) -> None:
        """To be called when the block is compiled: `cpu_linear` pays only then."""
        cpu_linear.choose(self.gate_proj, self.up_proj, self.down_proj, wide=True)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        x = self._enter(x)
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden if self.mid_norm is None else self.mid_norm(hidden))
