"""Initial weights: every parameter is drawn from its own generator, seeded by (seed, name).

So the same seed gives the same model in every layout and whatever order it is built in; a growing or
partly built model keeps the weights of the blocks it shares with another.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.placement import PLACEMENTS

_ROLES = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "gate_down": "norm_gate_in",
    "gate_up": "norm_gate_out",
}
_INSIDE = {"self_attn.gate_proj": "attn_gate"}
"""Names that mean something else inside this module."""
_WITH_BIAS = frozenset({"q", "k", "v", "gate", "up", "head"})
_OUTPUTS = frozenset({"o", "down"})
FIXNORM_RANGE = 0.01
"""FixNorm draws its embedding from U(-0.01, 0.01) under every rule (code of arXiv 1910.05895)."""
CUT = 3.0
"""Standard deviations at which truncated rules cut."""
_ZERO = frozenset({"norm_gate_out"})
"""Roles that start at 0 under every rule: the gate of a GatedNorm is then 1."""


@dataclass(frozen=True)
class Matrix:
    """A matrix to initialise: its role, its block (0 for embedding and head) and its shape, out x in."""

    role: str
    index: int
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Draw:
    """A distribution of mean 0, cut at +-`CUT` standard deviations when `truncated`; normal unless
    `model.initializer_shape` says otherwise."""

    std: float
    truncated: bool = False


def _normal(matrix: Matrix, model: ModelConfig) -> Draw:
    return Draw(model.initializer_range)


def _scaled(matrix: Matrix, model: ModelConfig) -> Draw:
    """GPT-2 and Megatron: output projections divided by sqrt(2L)."""
    depth = math.sqrt(2 * model.num_hidden_layers) if matrix.role in _OUTPUTS else 1.0
    return Draw(model.initializer_range / depth)


def _scaled_depth(matrix: Matrix, model: ModelConfig) -> Draw:
    """The depth-scaled initialisation in the LayerNorm Scaling paper's table: outputs of block l by sqrt(2l)."""
    depth = math.sqrt(2 * (matrix.index + 1)) if matrix.role in _OUTPUTS else 1.0
    return Draw(model.initializer_range / depth)


def _truncated(matrix: Matrix, model: ModelConfig) -> Draw:
    """OLMo-core `normal`: one standard deviation for everything, cut at 3 of them."""
    return Draw(model.initializer_range, truncated=True)


def _olmo_llama(matrix: Matrix, model: ModelConfig, layers: int) -> Draw:
    """OLMo-core's two llama rules: attention output, w2 **and** w3 (up) by sqrt(2 layers); embeddings N(0, 1)."""
    if matrix.role == "embed":
        return Draw(1.0)
    if matrix.role == "head":
        return Draw(model.hidden_size**-0.5, truncated=True)
    depth = math.sqrt(2 * layers) if matrix.role in {"o", "up", "down"} else 1.0
    return Draw(0.02 / depth, truncated=True)


def _llama(matrix: Matrix, model: ModelConfig) -> Draw:
    """OLMo-core `llama`: by the number of blocks."""
    return _olmo_llama(matrix, model, model.num_hidden_layers)


def _llama_depth(matrix: Matrix, model: ModelConfig) -> Draw:
    """OLMo-core `llama_depth`: by the block's own number."""
    return _olmo_llama(matrix, model, matrix.index + 1)


def _fan_in(matrix: Matrix, model: ModelConfig) -> Draw:
    """OLMo-core `fan_in`: 1/sqrt(inputs) of each matrix, embeddings N(0, 1), no term for depth."""
    return Draw(1.0) if matrix.role == "embed" else Draw(matrix.in_features**-0.5, truncated=True)


def _mitchell(matrix: Matrix, model: ModelConfig) -> Draw:
    """OLMo 1 `mitchell`: 1/sqrt(inputs), outputs of block i (from 0) also by sqrt(2(i+1))."""
    depth = math.sqrt(2 * (matrix.index + 1)) if matrix.role in _OUTPUTS else 1.0
    return Draw(matrix.in_features**-0.5 / depth, truncated=True)


def _tinyllama(matrix: Matrix, model: ModelConfig) -> Draw:
    """TinyLlama, and the stacking code made from it: sqrt(2/(5 inputs)), outputs 1/sqrt(inputs)/L."""
    if matrix.role in _OUTPUTS:
        return Draw(matrix.in_features**-0.5 / model.num_hidden_layers)
    return Draw(math.sqrt(2 / (5 * matrix.in_features)))


def _transformers_without_tears(matrix: Matrix, model: ModelConfig) -> Draw:
    """SmallInit (arXiv 1910.05895): attention sqrt(2/(5d)), feed-forward Glorot's sqrt(2/(d + f))."""
    if matrix.role in {"gate", "up", "down"}:
        return Draw(math.sqrt(2 / (matrix.in_features + matrix.out_features)))
    return Draw(math.sqrt(2 / (5 * model.hidden_size)))


def _small_init(matrix: Matrix, model: ModelConfig) -> Draw:
    """gpt-neox small_init with wang_init outputs: sqrt(2/(5d)), outputs 2/(L sqrt d)."""
    if matrix.role in _OUTPUTS:
        return Draw(2 / (model.num_hidden_layers * math.sqrt(model.hidden_size)))
    return Draw(math.sqrt(2 / (5 * model.hidden_size)))


def _tiny_init(matrix: Matrix, model: ModelConfig) -> Draw:
    """Pangu Ultra TinyInit: sqrt(1/(2dL)), embeddings 0.5."""
    if matrix.role == "embed":
        return Draw(0.5)
    return Draw(math.sqrt(1 / (2 * model.hidden_size * model.num_hidden_layers)))


def _full_megatron(matrix: Matrix, model: ModelConfig) -> Draw:
    """HybridNorm: sqrt(2/(5d)) cut at 3 sigma, outputs by sqrt(2L), untied head 1/sqrt(d)."""
    if matrix.role == "head":
        return Draw(model.hidden_size**-0.5, truncated=True)
    depth = math.sqrt(2 * model.num_hidden_layers) if matrix.role in _OUTPUTS else 1.0
    return Draw(math.sqrt(2 / (5 * model.hidden_size)) / depth, truncated=True)


def _xavier(matrix: Matrix, model: ModelConfig) -> Draw:
    """Glorot normal, as in the DeepNorm paper; embeddings and head keep `initializer_range`."""
    if matrix.role in {"embed", "head"}:
        return Draw(model.initializer_range)
    return Draw(math.sqrt(2 / (matrix.out_features + matrix.in_features)))


RULES: dict[str, Callable[[Matrix, ModelConfig], Draw]] = {
    "normal": _normal,
    "truncated": _truncated,
    "scaled": _scaled,
    "scaled_depth": _scaled_depth,
    "llama": _llama,
    "llama_depth": _llama_depth,
    "fan_in": _fan_in,
    "mitchell": _mitchell,
    "tinyllama": _tinyllama,
    "transformers_without_tears": _transformers_without_tears,
    "small_init": _small_init,
    "tiny_init": _tiny_init,
    "full_megatron": _full_megatron,
    "xavier": _xavier,
}


def role_of(name: str) -> str | None:
    """Role of a parameter from its checkpoint name; None for norms, scales and gains."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return None
    return _INSIDE.get(".".join(parts[-3:-1])) or _ROLES.get(parts[-2])


def bias_role(name: str) -> str | None:
    """Role of the matrix whose bias (`model.input_bias`) this parameter is; None for everything else."""
    parts = name.split(".")
    role = _ROLES.get(parts[-2]) if parts[-1] == "bias" else None
    return role if role in _WITH_BIAS else None


def layer_index(name: str) -> int | None:
    """Block number in a checkpoint name, None outside blocks."""
    parts = name.split(".")
    return int(parts[2]) if parts[:2] == ["model", "layers"] else None


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the parameter's name only."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _rule(name: str, role: str, shape: tuple[int, ...], model: ModelConfig, norm: NormConfig) -> Draw:
    """How matrix `name` is drawn: the initialiser's rule and the placement's gain."""
    rule = RULES[model.initializer](Matrix(role, layer_index(name) or 0, *shape), model)
    return replace(rule, std=rule.std * PLACEMENTS[norm.placement].matrix_gain(role, model.num_hidden_layers))


def initial_std(name: str, shape: tuple[int, ...], model: ModelConfig, norm: NormConfig) -> float | None:
    """Standard deviation of the initial values of `name`; None for what no rule draws (vectors, scalars)."""
    role = role_of(name)
    return None if role is None or role in _ZERO else _rule(name, role, shape, model, norm).std


def draw(name: str, shape: tuple[int, ...], model: ModelConfig, norm: NormConfig, seed: int) -> Tensor | None:
    """Initial fp32 values of matrix or bias `name`, on the CPU; None for a parameter whose constructor sets it."""
    if bias_role(name) is not None:
        return torch.zeros(shape)
    role = role_of(name)
    if role is None:
        return None
    if role in _ZERO:
        return torch.zeros(shape)
    if role == "embed" and model.fixnorm:
        return torch.empty(shape).uniform_(-FIXNORM_RANGE, FIXNORM_RANGE, generator=generator_for(seed, name))
    rule = _rule(name, role, shape, model, norm)
    std = rule.std
    values, generator = torch.empty(shape), generator_for(seed, name)
    if model.initializer_shape != 2.0:
        unit = generalised_gaussian(values.numel(), model.initializer_shape, CUT if rule.truncated else None, generator)
        return unit.mul_(std).view(shape)
    if rule.truncated:
        return nn.init.trunc_normal_(values, 0.0, std, -CUT * std, CUT * std, generator=generator)
    return values.normal_(0.0, std, generator=generator)


def generalised_gaussian(count: int, shape: float, cut: float | None, generator: torch.Generator) -> Tensor:
    """`count` fp32 numbers with density ~ exp(-|x/a|^shape) and standard deviation 1 (before the cut), where
    a = sqrt(Gamma(1/shape) / Gamma(3/shape)): 2 is the normal, 1 the Laplace distribution (arXiv 2506.00486).

    cut: numbers further from 0 are drawn again; None keeps them. |x/a|^shape has a Gamma(1/shape) distribution.
    """
    scale = math.exp(0.5 * (math.lgamma(1 / shape) - math.lgamma(3 / shape)))
    source = np.random.Generator(np.random.PCG64(generator.initial_seed()))

    def draws(n: int) -> np.ndarray:
        size = source.standard_gamma(1 / shape, n) ** (1 / shape)
        return scale * size * (1 - 2 * source.integers(0, 2, n))

    values = draws(count)
    while cut is not None and (outside := np.flatnonzero(np.abs(values) > cut)).size:
        values[outside] = draws(outside.size)
    return torch.from_numpy(values.astype(np.float32))


@torch.no_grad()
def initialise(decoder: nn.Module, model: ModelConfig, norm: NormConfig, seed: int) -> None:
    """Fill `decoder` in place: matrices by `model.initializer` and the placement's gain.

    Vectors and scalars, norms among them, keep what their constructors set.
    """
    for name, parameter in decoder.named_parameters():
        values = draw(name, tuple(parameter.shape), model, norm, seed)
        if values is not None:
            parameter.copy_(values)
