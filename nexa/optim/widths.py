"""How learning rate, weight decay and initial weights of a parameter follow the width: rules as tables.

A rule was tuned at `optim.base_hidden_size`; with m = model.hidden_size / optim.base_hidden_size a parameter of a class
has

    rate = scheduled rate * m^lr,   weight decay = optim.weight_decay * m^decay,
    initial std = (that of the initialiser at the base width) * m^init.

m = 1 multiplies by 1.0 everywhere and is the same, bit for bit, as no rule.

muP is table 8 of Yang et al. (arXiv 2203.03466, Tensor Programs V) for Adam: input weights, biases and gains have the
initial variance and the rate of the base, hidden matrices variance and rate 1/fan_in; the output's variance and rate
stay and its result is multiplied by 1/fan_in. A multiplier would change the exported function. Under Adam, whose
update does not depend on the size of the gradient (but for eps), a multiplier c is the same as c times the initial
weights, c times the rate (table 3 of the paper) and 1/c times the weight decay, because a step decays by rate times
decay. So the head has m^-1, m^-1 and m^+1 here and no multiplier. A tied head cannot: there the gain of the last norm,
which the head alone reads, has them instead.

Attention needs no factor because heads keep their size: the paper's 1/d_head in place of 1/sqrt(d_head) is of heads
that grow. eps is not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import nn

from nexa.config.schema import Config, ModelConfig, NormConfig
from nexa.model.init import initial_std, role_of

FINAL_NORM = "model.norm."
CLASSES = {"embed": "input", "head": "output", "norm_gate_in": "output", "norm_gate_out": "input"}
"""Role of a matrix -> its class: which of its dimensions grow with the width. Others grow in both: `hidden`."""


@dataclass(frozen=True)
class Powers:
    """Exponents of the width ratio m; `decay` is of the coefficient that a rate multiplies."""

    lr: float = 0.0
    decay: float = 0.0
    init: float = 0.0


SAME = Powers()
_OUTPUT = Powers(lr=-1.0, decay=1.0, init=-1.0)


def _mup(decay: float) -> Mapping[str, Powers]:
    """muP with this exponent for the decay of hidden matrices; what is not in the table is as at the base."""
    hidden = Powers(lr=-1.0, decay=decay, init=-0.5)
    return MappingProxyType({"hidden": hidden, "output": _OUTPUT, "tied_gain": _OUTPUT})


RULES: dict[str, Mapping[str, Powers]] = {
    "none": MappingProxyType({}),
    # rate x decay of every parameter stays, as in the authors' own MuAdamW (github.com/microsoft/mup, mup/optim.py)
    "mup": _mup(1.0),
    # decay ~ sqrt(width): the singular values of hidden matrices stay in the steady state, where the largest goes as
    # sqrt(rate / decay) width^(3/4) (Fan et al., arXiv 2510.15262); embedding and vectors have no decay there
    "mup_root_decay": _mup(0.5),
    # the coefficient as it is: rate x decay falls with the width
    "mup_plain_decay": _mup(0.0),
}
"""`optim.width_rule` -> class of parameters -> powers. A new rule is a row."""


@dataclass(frozen=True)
class Width:
    """A rule at a width. base: the model of the same depth at the base width, as far as initialisers read it."""

    rule: str = "none"
    ratio: float = 1.0
    tied: bool = False
    base: ModelConfig | None = None

    @classmethod
    def of(cls, cfg: Config) -> Width:
        """As a valid configuration asks for, with the model's present size."""
        model, base = cfg.model, cfg.optim.base_hidden_size
        ratio = 1.0 if base is None else model.hidden_size / base
        proxy = replace(model, hidden_size=base or model.hidden_size, intermediate_size=_part(model, ratio))
        return cls(cfg.optim.width_rule, ratio, model.tie_word_embeddings, proxy)

    def class_of(self, name: str) -> str:
        """`input`, `hidden` or `output` for a matrix of this checkpoint name; `vector`, or `tied_gain`, for others."""
        role = role_of(name)
        if role is not None:
            return CLASSES.get(role, "hidden")
        return "tied_gain" if self.tied and name.startswith(FINAL_NORM) else "vector"

    def powers(self, name: str) -> Powers:
        """The row of the rule for the parameter of this checkpoint name."""
        return RULES[self.rule].get(self.class_of(name), SAME)

    def lr(self, name: str) -> float:
        """Factor on the scheduled rate."""
        return float(self.ratio ** self.powers(name).lr)

    def decay(self, name: str) -> float:
        """Factor on the weight decay."""
        return float(self.ratio ** self.powers(name).decay)

    def initial(self, name: str, shape: tuple[int, ...], model: ModelConfig, norm: NormConfig) -> float:
        """Factor on the initial values that `nexa.model.init` or a constructor gives a parameter of this shape."""
        if self.rule == "none" or self.base is None:
            return 1.0
        factor, std = float(self.ratio ** self.powers(name).init), initial_std(name, shape, model, norm)
        if not std:
            return factor
        rows, columns = shape
        of_base = round(rows / self.ratio) if self.class_of(name) == "hidden" else rows, round(columns / self.ratio)
        proxy = initial_std(name, of_base, self.base, norm)
        assert proxy is not None, name
        return factor * (proxy / std)


NO_RULE = Width()


def _part(model: ModelConfig, ratio: float) -> int:
    return round(model.intermediate_size / ratio)


@torch.no_grad()
def scale_initial(decoder: nn.Module, width: Width, model: ModelConfig, norm: NormConfig) -> None:
    """Multiply the freshly drawn weights of a whole model by the rule's factors, in place."""
    for name, parameter in decoder.named_parameters():
        factor = width.initial(name, tuple(parameter.shape), model, norm)
        if factor != 1.0:
            parameter.mul_(factor)
