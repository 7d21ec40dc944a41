"""Which dimension of a tensor belongs to which size of the model, and which unit of the source each new unit is.

What computes a unit is copied with it; what reads it is divided by how often it occurs, so that the sum stays (Net2Net,
arXiv 1511.05641; bert2BERT's FPI, arXiv 2110.07143). A mean square over units that all occur as often is the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nexa.config.schema import ModelConfig, NormConfig
from nexa.errors import UserError


@dataclass(frozen=True)
class Dim:
    """A dimension of a tensor: `axis` is a key of `spreads`.

    reads: what stands here meets the units of the axis in a sum. gradient: what stands here is a gradient by them.
    """

    axis: str
    reads: bool = False
    gradient: bool = False


@dataclass(frozen=True)
class Spread:
    """Where the units of an axis come from: `index` [n'] is the unit of the source, int64; `counts` [n'] how often that
    unit occurs, fp32; `size` n."""

    index: Tensor
    counts: Tensor
    size: int

    @classmethod
    def of(cls, index: Tensor, size: int) -> Spread:
        """From the map alone."""
        return cls(index, torch.bincount(index, minlength=size)[index].float(), size)

    @property
    def growth(self) -> float:
        """n' / n."""
        return len(self.index) / self.size


def head_maps(heads: int, kv_heads: int, new_heads: int, new_kv_heads: int) -> tuple[Tensor, Tensor]:
    """(source of each query head [h'], of each key-value head [g']) such that every new query head looks at a copy of
    what its source looks at.

    Raises UserError when the sizes allow no such maps.
    """
    for name, new, old in (("attention", new_heads, heads), ("key_value", new_kv_heads, kv_heads)):
        if new < old or new % old:
            raise UserError(f"num_{name}_heads={new}: must be a multiple of the {old} that there are")
    query, shared = new_heads // heads, new_kv_heads // kv_heads
    if max(query, shared) % min(query, shared):
        raise UserError(
            f"num_attention_heads={new_heads}, num_key_value_heads={new_kv_heads}: {query} and {shared} times what "
            "there is; one must be a multiple of the other, or copies of a head would look at other keys"
        )
    # both grow by the smaller number in whole sets; what is left of the larger one repeats heads next to each other
    together = min(query, shared)

    def source(old: int, times: int) -> Tensor:
        return torch.arange(old).repeat_interleave(times // together).repeat(together)

    return source(heads, query), source(kv_heads, shared)


def spreads(old: ModelConfig, new: ModelConfig) -> dict[str, Spread]:
    """The axes that change, by name."""
    size = old.head_dim or old.hidden_size // old.num_attention_heads
    kv_heads, new_kv_heads = (one.num_key_value_heads or one.num_attention_heads for one in (old, new))
    query, shared = head_maps(old.num_attention_heads, kv_heads, new.num_attention_heads, new_kv_heads)

    def features(heads: Tensor) -> Tensor:
        return (heads[:, None] * size + torch.arange(size)).flatten()

    maps = {
        "hidden": (torch.arange(new.hidden_size) % old.hidden_size, old.hidden_size),
        "intermediate": (torch.arange(new.intermediate_size) % old.intermediate_size, old.intermediate_size),
        "heads": (query, old.num_attention_heads),
        "query": (features(query), old.num_attention_heads * size),
        "key_value": (features(shared), kv_heads * size),
    }
    return {name: Spread.of(index, size) for name, (index, size) in maps.items() if len(index) != size}


_HIDDEN, _INSIDE, _QUERY = Dim("hidden"), Dim("intermediate"), Dim("query")
_READS_HIDDEN = Dim("hidden", reads=True)
_LINEAR: dict[str, tuple[Dim | None, Dim | None]] = {
    "model.embed_tokens": (None, _HIDDEN),
    "lm_head": (None, _READS_HIDDEN),
    "self_attn.q_proj": (_QUERY, _READS_HIDDEN),
    "self_attn.k_proj": (Dim("key_value"), _READS_HIDDEN),
    "self_attn.v_proj": (Dim("key_value"), _READS_HIDDEN),
    "self_attn.gate_proj": (_QUERY, _READS_HIDDEN),
    "self_attn.o_proj": (_HIDDEN, Dim("query", reads=True)),
    "mlp.gate_proj": (_INSIDE, _READS_HIDDEN),
    "mlp.up_proj": (_INSIDE, _READS_HIDDEN),
    "mlp.down_proj": (_HIDDEN, Dim("intermediate", reads=True)),
}
_VECTORS = {
    "self_attn.head_scale": Dim("heads"),
    "self_attn.qk_scale": None,
    "model.embed_scale": None,
    "mlp.residual_gain": _HIDDEN,
    "attn_scale": _HIDDEN,
    "mlp_scale": _HIDDEN,
}
_SITES: dict[str, Dim | None] = {
    "mlp.mid_norm": _INSIDE,
    "self_attn.q_norm": _QUERY,
    "self_attn.k_norm": Dim("key_value"),
    "self_attn.v_norm": None,
} | dict.fromkeys(
    (
        "input_layernorm",
        "post_attention_layernorm",
        "attn_norm.output",
        "attn_norm.residual",
        "mlp_norm.output",
        "mlp_norm.residual",
        "model.embed_norm",
        "model.norm",
    ),
    _HIDDEN,
)
FINAL_NORM = "model.norm"
_READING = frozenset({"beta", "gate_down.weight"})
_GRADIENTS = frozenset({"running_gradient", "recent_gradients"})


def within_block(name: str) -> str:
    """A checkpoint name without `model.layers.i.`."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def site_and_part(name: str) -> tuple[str, str] | None:
    """(site, part) of a tensor of a norm, such as ("mlp.mid_norm", "weight"); None for other tensors."""
    short = within_block(name)
    return next(((site, short[len(site) + 1 :]) for site in _SITES if short.startswith(f"{site}.")), None)


def dims(name: str, model: ModelConfig, norm: NormConfig) -> tuple[Dim | None, Dim | None]:
    """What (rows, columns) of a tensor are; a vector is one row, and so is a list of vectors for each.

    Raises UserError for a tensor that there is no rule for.
    """
    short = within_block(name)
    owner, _, part = short.rpartition(".")
    if owner in _LINEAR:
        rows, columns = _LINEAR[owner]
        if owner == "self_attn.gate_proj" and model.attention_gate == "headwise":
            rows = Dim("heads")
        return (rows, columns) if part == "weight" else (None, rows)
    if short in _VECTORS:
        return None, _VECTORS[short]
    if (found := site_and_part(name)) is None:
        raise UserError(f"{name}: growth has no rule for this tensor")
    site, part = found
    dim = None if site.startswith("self_attn.") and norm.qk != "rms_full" else _SITES[site]
    if dim is None:
        return None, None
    if part == "gate_up.weight":
        return dim, None
    return None, replace(dim, reads=part in _READING, gradient=part in _GRADIENTS)
