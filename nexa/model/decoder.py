"""The LLaMA decoder, in Hugging Face's parameter names."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import cpu_attention
from nexa.model.attention import AttentionContext, document_boundaries, document_mask
from nexa.model.block import Block
from nexa.model.cache import Cache
from nexa.model.kinds import NormBuilder
from nexa.model.layers import Layers, unit_rows
from nexa.model.placement import block_plans, has_final_norm
from nexa.model.recompute import RECOMPUTE, Recompute
from nexa.model.rope import rope_tables

WHOLE = Layers()
"""The layers of a process that shares its model with no other."""


class DecoderStack(nn.Module):
    """Embedding, blocks, final norm: everything under `model.` in a checkpoint."""

    def __init__(self, model: ModelConfig, norm: NormConfig, layers: Layers = WHOLE) -> None:
        super().__init__()
        make = NormBuilder.of(model, norm, layers)
        self.head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        self.rope_theta, self.fixnorm = model.rope_theta, model.fixnorm
        self.recompute: Recompute = "none"
        self.embed_tokens = layers.embedding(model.vocab_size, model.hidden_size)
        self.embed_scale = (
            nn.Parameter(torch.full((1,), math.sqrt(model.hidden_size))) if make.kind.embed_scale else None
        )
        self.embed_norm = make("embedding") if norm.embedding else None
        self.layers = nn.ModuleList(
            Block(model, norm, plan, make, layers) for plan in block_plans(norm, model.num_hidden_layers)
        )
        self.norm = make("final") if has_final_norm(norm) else None

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T] int64, document_ids [B, T] or None -> hidden states [B, T, d] (or a share of the tokens).

        cache: has read P tokens before these and reads these too; document_ids are then [B, P + T]. positions [T]
        or [B, T]: rotary positions; null counts on from P.
        """
        past = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids)
        if self.fixnorm:
            x = unit_rows(x) * math.sqrt(x.shape[-1])
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        # angles stay fp32 for half-precision activations: the rotation rounds once, at its end
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rope_tables(positions, self.head_dim, self.rope_theta, wide)
        shape = input_ids.shape[0], input_ids.shape[1]
        if cache is None:
            context = self._context(cos, sin, shape, document_ids, x.dtype)
        else:
            context = AttentionContext(cos, sin, shape, mask=_cached_mask(input_ids, document_ids, past))
        run = RECOMPUTE[self.recompute if self.training else "none"]
        for index, block in enumerate(self.layers):
            if cache is not None:
                context = replace(context, extend=partial(cache.update, layer_idx=index))
            x = run(block, x, context)
        return x if self.norm is None else self.norm(x)

    def _context(
        self, cos: Tensor, sin: Tensor, shape: tuple[int, int], document_ids: Tensor | None, dtype: torch.dtype
    ) -> AttentionContext:
        first = self.layers[0]
        assert isinstance(first, Block)
        if document_ids is None:
            by_products = first.self_attn.by_products and cpu_attention.serves(dtype, cos.device, shape[1])
            return AttentionContext(cos, sin, shape, ahead=cpu_attention.ahead(shape[1]) if by_products else None)
        if first.self_attn.flash:
            return AttentionContext(cos, sin, shape, cumulative=document_boundaries(document_ids))
        return AttentionContext(cos, sin, shape, mask=document_mask(document_ids))


def _cached_mask(input_ids: Tensor, document_ids: Tensor | None, past: int) -> Tensor | None:
    """What the last T of `past` + T tokens may see: bool [B or 1, 1, T, past + T], None where causality says it."""
    length = input_ids.shape[1]
    if document_ids is None and (past == 0 or length == 1):
        return None
    if document_ids is None:
        document_ids = input_ids.new_zeros(1, past + length)
    return document_mask(document_ids, length)


class Decoder(nn.Module):
    """The language model. `state_dict()` has the names of a checkpoint."""

    def __init__(
        self, model: ModelConfig, norm: NormConfig, loss_chunk_tokens: int = 4096, layers: Layers = WHOLE
    ) -> None:
        """Build with PyTorch's default weights; `init.initialise` draws the right ones.

        layers: makes what tensor parallelism shards; in its share of the model only the parameters are smaller.
        """
        super().__init__()
        self.config, self.norm_config = model, norm
        self.model = DecoderStack(model, norm, layers)
        self.lm_head = layers.head(model.hidden_size, model.vocab_size, model.input_bias)
        self.lm_head.chunk_tokens = loss_chunk_tokens
        self.lm_head.fixnorm = model.fixnorm and model.tie_word_embeddings
        if model.tie_word_embeddings:
            self.lm_head.weight = self.embedding_weight

    @property
    def embedding_weight(self) -> nn.Parameter:
        """The embedding table [V, d], or this rank's rows of it."""
        weight = self.model.embed_tokens.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
        row_weights: Tensor | None = None,
    ) -> Any:
        """Logits [B, T, V]; with labels [B, T] (-100: not scored) the summed cross-entropy, a scalar; with
        row_weights [B] beside them (sum of weight x cross-entropy of the row, a scalar; cross-entropy of each row [B],
        without the weights and without a gradient).

        Raises nothing for long sequences: rotary positions have no end; the config check compares
        data.sequence_length with model.max_position_embeddings.
        """
        result = self.lm_head(self.model(input_ids, document_ids), labels, row_weights)
        return result if labels is not None else result.view(*input_ids.shape, -1)

    def compile_parts(self) -> None:
        """torch.compile where it pays: each block (one compilation serves all equal ones), norms and the loss.

        Their `forward`, so that hooks on them, as ZeRO-3 has, run around what is compiled and do not break it up.
        """
        for part in (*self.model.layers, self.model.embed_norm, self.model.norm):
            if part is not None:
                part.forward = torch.compile(part.forward)
            if isinstance(part, Block):
                part.self_attn.choose_kernel()
                part.mlp.choose_kernel()
        self.lm_head.compile_kernel()


def load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into `model`; names as in a checkpoint, all of them.

    `lm_head.weight` may be absent when the embeddings are tied. Raises RuntimeError naming missing,
    unexpected and misshapen tensors.
    """
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if tied and "lm_head.weight" not in state:
        state = {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
    model.load_state_dict(state, strict=True)


def parameter_count(model: ModelConfig, norm: NormConfig) -> int:
    """Number of parameters, a tied head counted once; allocates nothing."""
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(model, norm).parameters())


def flops_per_token(model: ModelConfig, norm: NormConfig, sequence_length: int) -> float:
    """Training FLOPs of one token: 6 per matrix weight, plus 12 L h d_h T for attention scores.

    The matrices include the head and exclude the embedding table (a look-up). Attention is counted
    without the causal half, as in the PaLM paper, appendix B, so that figures compare across trainers.
    """
    head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
    with torch.device("meta"):
        decoder = Decoder(model, norm)
    matrices = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Linear))
    attention = 12 * model.num_hidden_layers * model.num_attention_heads * head_dim * sequence_length
    return 6.0 * matrices + attention
