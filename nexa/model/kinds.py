"""Which norm a value of `norm.kind` means: one row per kind, and nothing else asks for a kind's name.

Query, key and value norms are RMSNorm whatever the kind (`attention`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import bounded, norms, removal, running
from nexa.model.layers import Features, Layers
from nexa.model.norms import FeatureNorm, NormSite, Part


@dataclass(frozen=True)
class Kind:
    """One kind. The texts are what `nexa norms` prints; n is the number of features."""

    build: Callable[[NormSite], nn.Module]
    formula: str
    initial: str
    """Its tensors and their initial values."""
    source: str
    embed_scale: bool = False
    """A learnable scalar, sqrt(d) at first, multiplies the embedding, because nothing later rescales it."""
    paired: bool = False
    """The norm before the feed-forward is given its variance by the one before attention (`bounded.BHyT`)."""
    removable: Callable[[NormSite], nn.Module] | None = None
    """The same with a denominator that can become a constant; None: there is no such thing."""
    warning: str = ""
    """What a run with it says at its start."""
    counts_units: str = ""
    """Why it does not give the same when every feature is there several times; empty: it does, but for gains."""


KINDS: dict[str, Kind] = {
    "rmsnorm": Kind(
        norms.RMSNorm.at, "w x / rms(x)", "w [n] 1", "arXiv 1910.07467", removable=removal.RemovableRMSNorm.at
    ),
    "layernorm": Kind(
        norms.LayerNorm.at,
        "w (x - mean) / std(x) + b",
        "w [n] 1, b [n] 0",
        "arXiv 1607.06450",
        removable=removal.RemovableLayerNorm.at,
    ),
    "crmsnorm": Kind(
        norms.CRMSNorm.at,
        "w x / sqrt((sum x^2 + (sum x)^2) / (n + 1) + eps)",
        "w [n] 1",
        "arXiv 2305.14858",
        counts_units="counts one coordinate more, minus the sum of the others",
    ),
    "scalenorm": Kind(norms.ScaleNorm.at, "w x / max(|x|, 1e-5)", "w [1] sqrt(n)", "arXiv 1910.05895"),
    "dyt": Kind(norms.DyT.at, "w tanh(alpha x)", "w [n] 1, alpha [1] by width", "arXiv 2503.10622", embed_scale=True),
    "seednorm": Kind(
        norms.SeeDNorm.at,
        "(tanh(x . beta) alpha + w) x / rms(x)",
        "w [n] 1, alpha [n] 1, beta [n] 0",
        "arXiv 2510.22777",
    ),
    "gatednorm": Kind(
        norms.GatedNorm.at,
        "2 y sigmoid(U silu(D y)), y = w x / rms(x)",
        "w [n] 1, D [r, n] random, U [n, r] 0",
        "arXiv 2601.22966",
    ),
    "eln": Kind(
        bounded.ELN.at,
        "w x / sqrt(x^2 + c^2 + eps) + b",
        "w [n] 1, b [n] 0, c [1] 1 / alpha of dyt",
        "arXiv 2503.21708",
        embed_scale=True,
    ),
    "bhyt": Kind(
        bounded.BHyT.at,
        "w tanh(lambda x / (10 rms(x))), the rms before the feed-forward from that of the block's input",
        "w [n] 1, lambda [1] 2, before the feed-forward 1",
        "arXiv 2601.09719",
        paired=True,
        counts_units="takes |W_O W_V|^2 over the number of features for a variance",
    ),
    "powernorm": Kind(
        running.PowerNorm.at,
        "w u / sqrt(mean over tokens of u^2) + b, u = x / rms(x); running mean after warm-up and in evaluation",
        "w [n] 1, b [n] 0; statistics running_square [n] 1, running_gradient [n] 0, updates [1] 0",
        "arXiv 2003.07845",
        warning="norm.kind=powernorm: while it warms up (norm.warmup_steps) training divides by statistics of the "
        "batch, so that a token's prediction depends on later tokens; training losses of these steps are no "
        "likelihoods, validation losses are",
    ),
    "unifiednorm": Kind(
        running.UnifiedNorm.at,
        "w x / sqrt(mean over tokens of x^2) + b; over 4 passes after warm-up, running mean in evaluation",
        "w [n] 1, b [n] 0; statistics as powernorm, and recent_squares, recent_gradients [4, n] 0",
        "arXiv 2208.01313",
        warning="norm.kind=unifiednorm: training divides by statistics that include the batch's own, so that a token's "
        "prediction depends on later tokens; training losses are no likelihoods, validation losses are",
    ),
}


@dataclass(frozen=True)
class NormBuilder:
    """Makes the norms of one model: call it with what differs between them."""

    kind: Kind
    eps: float
    width: int
    gate_rank: int
    pre_affine: bool = False
    warmup_steps: int | None = None
    layers: Layers = field(default_factory=Layers)
    removal: bool = False
    """Whether sublayers and head read norms that can be removed."""

    @classmethod
    def of(cls, model: ModelConfig, norm: NormConfig, layers: Layers | None = None) -> NormBuilder:
        """For a configuration. KeyError for an unknown kind (the config check comes first)."""
        eps = model.rms_norm_eps if norm.eps is None else norm.eps
        own = norm.gate_rank, norm.pre_affine, norm.warmup_steps
        removes = norm.removal.start is not None
        return cls(KINDS[norm.kind], eps, model.hidden_size, *own, layers or Layers(), removes)

    def __call__(self, part: Part, features: Features | None = None, gain: float = 1.0) -> nn.Module:
        """A norm of `part` over `features` (None: the residual stream's), `gain` on its initial weight."""
        features = self.layers.stream(self.width) if features is None else features
        build = self.kind.build
        if self.removal and part != "embedding":
            assert self.kind.removable is not None  # the config check comes first
            build = self.kind.removable
        norm = build(NormSite(features, self.eps, self.width, part, self.gate_rank, gain, self.warmup_steps))
        if self.pre_affine:
            assert isinstance(norm, FeatureNorm)  # the config check comes first
            norm.add_pre_weight()
        return norm
