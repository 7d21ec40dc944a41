"""Norms that can be taken out of a trained model: from a certain step on they divide by a constant.

y = weight * (x [- mean]) / c [+ bias], where c is what the norm measures or, once it is removed, the mean over tokens
of what it used to measure (Heimersheim 2024, arXiv 2409.13710; Baroni et al. 2025, arXiv 2507.02559). That is linear,
and `nexa convert --to none` lets the matrices behind it take it over. `nexa.train.hooks.removal` says when.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from nexa.config.schema import RemovalConfig
from nexa.model.norms import LayerNorm, NormSite, RMSNorm, at_least_fp32
from nexa.model.statistics import WithStatistics

MOMENTUM = 0.9
"""Share of the running average that a step leaves."""

_SITES: dict[str, Callable[[int], list[str]]] = {
    "feed_forward": lambda layers: [f"model.layers.{index}.post_attention_layernorm" for index in range(layers)],
    "attention": lambda layers: [f"model.layers.{index}.input_layernorm" for index in range(layers)],
    "final": lambda layers: ["model.norm"],
}


def sites(removal: RemovalConfig, layers: int) -> list[str]:
    """Names of the norms that go, in their order, of a model of so many blocks."""
    return [name for part in removal.order for name in _SITES[part](layers)]


def removed_after(removal: RemovalConfig, step: int) -> int:
    """How many norms of that list are constants after `step`, if the list is long enough: 1 after step `start`."""
    if removal.start is None or step < removal.start:
        return 0
    return (step - removal.start) // removal.every + 1


class Removable(WithStatistics):
    """What both kinds share.

    fixed_rms: running average over steps of the mean denominator of a step's tokens; 0 before the first step.
    removed: 1 when that is what the norm divides by.
    """

    fixed_rms: Tensor
    removed: Tensor
    tally: Tensor | None = None
    """Sum and number [2] of the denominators of this step, where somebody asks for them."""

    def _begin(self) -> None:
        self.statistic("fixed_rms", 0.0)
        self.statistic("removed", 0.0)

    def denominator(self, measured: Tensor) -> Tensor:
        """What to divide by [..., 1]: `measured`, or the constant."""
        if self.training and self.tally is not None:
            with torch.no_grad():
                total = measured.sum()
                # computing a block again adds the same tokens to both
                self.tally.add_(torch.stack((total, torch.full_like(total, measured.numel()))))
        return torch.where(self.removed > 0, self.fixed_rms.to(measured.dtype), measured)


class RemovableRMSNorm(Removable, RMSNorm):
    """RMSNorm that can become weight * x / fixed_rms."""

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        norm = cls(site.features, site.eps, site.gain)
        norm._begin()
        return norm

    def unit(self, x: Tensor) -> Tensor:
        """`x` over its denominator, before the weight: [..., n] in the dtype of `x`."""
        wide = at_least_fp32(x)
        return (wide / self.denominator(torch.sqrt(self.mean_square(wide) + self.eps))).to(x.dtype)


class RemovableLayerNorm(Removable, LayerNorm):
    """LayerNorm that can become weight * (x - mean x) / fixed_rms + bias."""

    @classmethod
    def at(cls, site: NormSite) -> nn.Module:
        """The norm for `site`."""
        norm = cls(site.features, site.eps, site.gain)
        norm._begin()
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> [..., n]."""
        wide = at_least_fp32(x)
        centred = wide - self._mean(wide)
        unit = centred / self.denominator(torch.sqrt(self._mean(centred.square()) + self.eps))
        return unit.to(x.dtype) * self.weight + self.bias
