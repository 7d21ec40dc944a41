"""A LLaMA decoder whose norms stand where `config.nexa_plan` says and compute what `config.nexa_norm` says.

Part of an exported model folder; needs torch and transformers (4.50 and later, 5 included) and nothing else. Open
the folder with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

A sublayer f (attention or feed-forward) maps the residual stream x to

    y = M_residual( skip_scale * x + branch_scale * M_output( f( input_scale * M_input(x) ) ) )

where each M is a norm or absent. Statistics of norms are taken in fp32 (fp64 for fp64 input).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nexa import NexaConfig
from .norms_nexa import KINDS, BHyT, RMSNorm, wide_of

Plan = dict[str, Any]


def _eps(config: NexaConfig) -> float:
    eps = config.nexa_norm.get("eps")
    return config.rms_norm_eps if eps is None else eps


def _norm(config: NexaConfig, size: int | None = None) -> nn.Module:
    """A norm of the model's kind; its weights come from the checkpoint."""
    kind = config.nexa_norm["kind"]
    if kind not in KINDS:
        raise ValueError(f"config.json: nexa_norm.kind={kind!r}: must be one of {', '.join(KINDS)}")
    norm: nn.Module = KINDS[kind](size or config.hidden_size, _eps(config), config.nexa_norm.get("gate_rank", 16))
    if config.nexa_norm.get("pre_affine"):
        norm.pre_weight = nn.Parameter(torch.ones(size or config.hidden_size))
    return norm


def _unit_rows(x: Tensor) -> Tensor:
    """Every row with length one (FixNorm)."""
    wide = wide_of(x)
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True).clamp_min(1e-24))).to(x.dtype)


def _rope(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, 1, head_dim] in Hugging Face's half-split order."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    angle = torch.outer(positions.to(dtype), theta**-exponent)
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; all norms of q, k, v act before rotation."""

    def __init__(self, config: NexaConfig, plan: Plan, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, eps = layer, config.head_dim, _eps(config)
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        d, width, kv_width = config.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(d, width, bias=config.nexa_input_bias)
        self.k_proj = nn.Linear(d, kv_width, bias=config.nexa_input_bias)
        self.v_proj = nn.Linear(d, kv_width, bias=config.nexa_input_bias)
        self.o_proj = nn.Linear(width, d, bias=False)
        qk, norms = config.nexa_norm.get("qk", "none"), plan.get("head_norms", ())
        per_head = {*norms, *(("q", "k") if qk == "rms" else ())}
        self.full = qk == "rms_full"
        self.q_norm = RMSNorm(width if self.full else self.head_dim, eps) if self.full or "q" in per_head else None
        self.k_norm = RMSNorm(kv_width if self.full else self.head_dim, eps) if self.full or "k" in per_head else None
        self.v_norm = RMSNorm(self.head_dim, eps) if "v" in per_head else None
        self.qk_scale = nn.Parameter(torch.ones(1)) if qk == "cosine" else None
        self.head_scale = nn.Parameter(torch.ones(self.heads)) if plan.get("head_scale") else None
        self.scales_output = plan.get("head_scale") == "output"
        gates = {"elementwise": width, "headwise": self.heads}.get(getattr(config, "nexa_attention_gate", "none"))
        self.gate_proj = nn.Linear(d, gates, bias=False) if gates else None
        self.known: tuple[Any, Tensor] | None = None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: Any) -> Tensor:
        """[B, T, d] -> [B, T, d]; `past` is a cache of transformers or None."""
        shape = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self._normed(self.q_norm, q), self._normed(self.k_norm, k)
        if self.v_norm is not None:
            v = self.v_norm(v)
        scale = self.head_dim**-0.5
        if self.qk_scale is not None:
            q, k = F.normalize(q, dim=-1, eps=1e-12) * self.qk_scale, F.normalize(k, dim=-1, eps=1e-12)
            scale = 1.0
        q, k, v = _rotate(q, *rope).transpose(1, 2), _rotate(k, *rope).transpose(1, 2), v.transpose(1, 2)
        if past is not None:
            k, v = past.update(k, v, self.layer)
        grouped = self.kv_heads != self.heads
        causal = mask is None and k.shape[2] == q.shape[2]
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
        ).transpose(1, 2)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x)).unflatten(-1, (self.heads, -1))
        if self.head_scale is not None and not self.scales_output:
            y = y * self.head_scale[:, None]
        result: Tensor = self.o_proj(y.flatten(-2))
        if self.head_scale is not None and self.scales_output:
            result = (result.unflatten(-1, (self.heads, -1)) * self.head_scale[:, None]).flatten(-2)
        return result

    @torch.no_grad()
    def value_gain(self) -> Tensor:
        """|W_O W_V|_F^2, values repeated for the heads that share them; remembered while no weight changes."""
        v, o = self.v_proj.weight, self.o_proj.weight
        state = None if self.training else [(w.data_ptr(), w._version, w.dtype, w.device) for w in (v, o)]
        if self.known is None or state is None or self.known[0] != state:
            outputs = o.unflatten(-1, (self.kv_heads, -1, self.head_dim)).sum(2)
            self.known = state, wide_of(outputs.flatten(1) @ v).square().sum()
        return self.known[1]

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """[B, T, heads, head_dim], per head or over all heads together."""
        normed: Tensor = norm(x.flatten(-2)).view_as(x) if self.full else norm(x)
        return normed


class FeedForward(nn.Module):
    """down(mid_norm(silu(gate(x)) * up(x)))."""

    def __init__(self, config: NexaConfig, plan: Plan) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.nexa_input_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.nexa_input_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.mid_norm = _norm(config, config.intermediate_size) if plan.get("mid_norm") else None
        gain = config.nexa_norm.get("residual_gain")
        self.residual_gain = nn.Parameter(torch.ones(config.hidden_size)) if gain else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d] -> [B, T, d]; `residual_gain` is the block's business."""
        hidden = F.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(hidden if self.mid_norm is None else self.mid_norm(hidden))


class Block(nn.Module):
    """Attention and feed-forward, with norms where the plan puts them."""

    def __init__(self, config: NexaConfig, plan: Plan, layer: int) -> None:
        super().__init__()
        self.attn_plan, self.mlp_plan = plan["attn"], plan["mlp"]
        self.paired = config.nexa_norm["kind"] == "bhyt"
        tokens = config.nexa_norm.get("bhyt_tokens") or config.max_position_embeddings
        self.area = tokens * config.hidden_size
        self.input_layernorm = _norm(config) if self.attn_plan.get("input") else None
        self.self_attn = Attention(config, plan, layer)
        self.attn_norm = self._after(config, self.attn_plan)
        self.post_attention_layernorm = _norm(config) if self.mlp_plan.get("input") else None
        self.mlp = FeedForward(config, plan)
        self.mlp_norm = self._after(config, self.mlp_plan)
        self.attn_scale = self._scale(config, self.attn_plan)
        self.mlp_scale = self._scale(config, self.mlp_plan)

    @staticmethod
    def _after(config: NexaConfig, plan: Plan) -> nn.ModuleDict:
        return nn.ModuleDict({site: _norm(config) for site in ("output", "residual") if plan.get(site)})

    @staticmethod
    def _scale(config: NexaConfig, plan: Plan) -> nn.Parameter | None:
        """The learned factor on what a sublayer adds."""
        size = {"": 0, "scalar": 1, "vector": config.hidden_size}[plan.get("learned_scale", "")]
        return nn.Parameter(torch.ones(size)) if size else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, past: Any) -> Tensor:
        """[B, T, d] -> [B, T, d]."""
        first, second = self._variances(x) if self.paired else (None, None)
        y = self.self_attn(_enter(x, self.attn_plan, self.input_layernorm, first), rope, mask, past)
        x = _leave(x, y, self.attn_plan, self.attn_norm, self.attn_scale, None)
        y = self.mlp(_enter(x, self.mlp_plan, self.post_attention_layernorm, second))
        return _leave(x, y, self.mlp_plan, self.mlp_norm, self.mlp_scale, self.mlp.residual_gain)

    def _variances(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the two BHyT norms take for the mean squares of what they read, [B, T, 1]; the second approximates."""
        assert isinstance(self.input_layernorm, BHyT)
        bound = self.input_layernorm.bound().detach() * self.attn_plan.get("input_scale", 1.0)
        first = wide_of(x).square().mean(-1, keepdim=True)
        return first, first + self.self_attn.value_gain() / self.area * bound.square()


def _enter(x: Tensor, plan: Plan, norm: nn.Module | None, variance: Tensor | None) -> Tensor:
    y = x if norm is None else norm(x) if variance is None else norm(x, variance)
    return y * plan["input_scale"] if "input_scale" in plan else y


def _leave(x: Tensor, y: Tensor, plan: Plan, norms: nn.ModuleDict, scale: Tensor | None, gain: Tensor | None) -> Tensor:
    y = norms["output"](y) if "output" in norms else y
    factor = plan.get("branch_scale") if scale is None else scale
    y = y if factor is None else y * factor
    skip = x * plan["skip_scale"] if "skip_scale" in plan else x
    joined = (skip if gain is None else skip * gain) + y
    return norms["residual"](joined) if "residual" in norms else joined


class Stack(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: NexaConfig) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_scale = nn.Parameter(torch.ones(1)) if config.nexa_norm["kind"] in {"dyt", "eln"} else None
        self.fixnorm = getattr(config, "nexa_fixnorm", False)
        self.embed_norm = _norm(config) if config.nexa_norm.get("embedding") else None
        blocks = enumerate(config.nexa_plan["blocks"])
        self.layers = nn.ModuleList(Block(config, plan, layer) for layer, plan in blocks)
        self.norm = _norm(config) if config.nexa_plan["final_norm"] else None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, past: Any) -> Tensor:
        """input_ids [B, T], attention_mask [B, past + T] -> hidden states [B, T, d]."""
        seen, length = 0 if past is None else past.get_seq_length(), input_ids.shape[1]
        x = self.embed_tokens(input_ids)
        x = _unit_rows(x) * x.shape[-1] ** 0.5 if self.fixnorm else x
        x = x if self.embed_scale is None else x * self.embed_scale
        x = x if self.embed_norm is None else self.embed_norm(x)
        # padding moves positions by a constant, and rotary attention knows distances only
        positions = torch.arange(seen, seen + length, device=input_ids.device)
        rope = _rope(positions, self.head_dim, self.rope_theta, wide_of(x[:0]).dtype)
        mask = _mask(attention_mask, positions)
        for block in self.layers:
            x = block(x, rope, mask, past)
        return x if self.norm is None else self.norm(x)


def _mask(attention_mask: Tensor | None, positions: Tensor) -> Tensor | None:
    """Bool [B or 1, 1, T, past + T], True where a query may look; None where causality alone decides."""
    padded = attention_mask is not None and not bool(attention_mask.all())
    last = int(positions[-1]) + 1
    if not padded and len(positions) in {1, last}:
        return None
    keys = torch.arange(last, device=positions.device)
    mask = (keys <= positions[:, None])[None, None]
    if padded and attention_mask is not None:
        # a padding query looks at itself: a row without any key would be NaN
        mask = (mask & attention_mask[:, None, None, :last].bool()) | (keys == positions[:, None])
    return mask


class NexaForCausalLM(PreTrainedModel, GenerationMixin):
    """Any placement and kind of norm. Weights come from a checkpoint: the initial ones here are not the method's."""

    config_class = NexaConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' own type)
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_cache_class = True

    def __init__(self, config: NexaConfig) -> None:
        """Raises ValueError for a kind of norm that this file does not know."""
        super().__init__(config)
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.nexa_input_bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] for input_ids [B, T]; with labels [B, T] also their mean cross-entropy.

        As everywhere in transformers, labels are the input ids (-100: not scored) and are shifted in here;
        attention_mask [B, past + T] has 0 for padding, left or right; logits_to_keep: so many last positions, 0 is
        all. Raises ValueError for inputs_embeds and a cache of fixed size.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: not supported by nexa models")
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("past_key_values: nexa models take a DynamicCache, not one of fixed size")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        hidden = self.model(input_ids, attention_mask, past_key_values)
        hidden = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        unit = self.model.fixnorm and self.config.tie_word_embeddings
        logits = F.linear(hidden, _unit_rows(self.lm_head.weight)) if unit else self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the arguments differ between releases
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs = {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask, "use_cache": use_cache}
        return inputs | {"past_key_values": past_key_values, "logits_to_keep": kwargs.get("logits_to_keep") or 0}

    def get_input_embeddings(self) -> nn.Module:
        """The embedding table."""
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding table."""
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        """The output head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output head."""
        self.lm_head = new_embeddings


# so that save_pretrained copies these modules into the new folder
NexaConfig.register_for_auto_class("AutoConfig")
NexaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
