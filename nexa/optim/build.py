"""Optimizers by name, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from nexa.model.init import bias_role, role_of


def decays(name: str, *, decay_embeddings: bool = False, decay_norms: bool = False) -> bool:
    """Whether weight decay applies to the parameter of this checkpoint name.

    By name, not by shape: under ZeRO-3 a parameter that is not gathered is one-dimensional and empty,
    and grouping by `ndim` silently turns decay off. The gate matrices of a GatedNorm decay as every matrix does;
    `decay_norms` covers all vectors and scalars of norms, so SeeDNorm's alpha and beta come with the gains. Biases of
    linear layers never decay.
    """
    if bias_role(name) is not None:
        return False
    role = role_of(name)
    if role is None:
        return decay_norms
    return decay_embeddings if role == "embed" else True


def _adamw(groups: list[dict[str, Any]], lr: float, betas: list[float], eps: float) -> torch.optim.Optimizer:
    # fused: one pass over the flat buffers that ZeRO hands over
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), eps=eps, fused=True)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": _adamw}


def build(
    name: str,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay_embeddings: bool = False,
    decay_norms: bool = False,
    **hp: Any,
) -> torch.optim.Optimizer:
    """Optimizer `name` over (checkpoint name, parameter) pairs, in at most two groups.

    Each group carries `names`, the checkpoint names of its parameters. `hp`: the method's own keys of
    config group `optim`. KeyError for an unknown method.
    """
    groups: dict[bool, dict[str, Any]] = {
        True: {"params": [], "names": [], "weight_decay": weight_decay},
        False: {"params": [], "names": [], "weight_decay": 0.0},
    }
    for key, parameter in named_parameters:
        group = groups[decays(key, decay_embeddings=decay_embeddings, decay_norms=decay_norms)]
        group["params"].append(parameter)
        group["names"].append(key)
    return OPTIMIZERS[name]([g for g in groups.values() if g["params"]], lr=lr, **hp)
