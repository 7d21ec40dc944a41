"""The LLaMA decoder, in Hugging Face's parameter names."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.attention import AttentionContext, document_boundaries, document_mask
from nexa.model.block import Block
from nexa.model.cache import Cache
from nexa.model.kinds import NormBuilder
from nexa.model.loss import Kernel, compiled_kernel, linear_cross_entropy, nll_and_gradient
from nexa.model.placement import block_plans, has_final_norm
from nexa.model.rope import rope_tables


class Head(nn.Linear):
    """Output head; with labels it returns the summed cross-entropy without making the full logits.

    The loss is computed inside the module's forward so that ZeRO-3 has the weight gathered.
    """

    chunk_tokens: int = 4096
    kernel: Kernel = staticmethod(nll_and_gradient)

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor:
        """hidden [B, T, d] -> logits [B, T, V], or with labels [B, T] the summed loss, scalar."""
        if labels is None:
            return super().forward(hidden)
        flat = hidden.flatten(0, 1), self.weight, labels.flatten()
        return linear_cross_entropy(*flat, self.chunk_tokens, self.kernel)


class DecoderStack(nn.Module):
    """Embedding, blocks, final norm: everything under `model.` in a checkpoint."""

    def __init__(self, model: ModelConfig, norm: NormConfig) -> None:
        super().__init__()
        make = NormBuilder.of(model, norm)
        self.head_dim = model.head_dim or model.hidden_size // model.num_attention_heads
        self.rope_theta = model.rope_theta
        self.checkpoint_blocks = False
        self.embed_tokens = nn.Embedding(model.vocab_size, model.hidden_size)
        self.embed_scale = (
            nn.Parameter(torch.full((1,), math.sqrt(model.hidden_size))) if make.kind.embed_scale else None
        )
        self.embed_norm = make("embedding") if norm.embedding else None
        self.layers = nn.ModuleList(
            Block(model, norm, plan, make) for plan in block_plans(norm, model.num_hidden_layers)
        )
        self.norm = make("final") if has_final_norm(norm) else None

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: Cache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """input_ids [B, T] int64, document_ids [B, T] or None -> hidden states [B, T, d].

        cache: has read P tokens before these and reads these too; document_ids are then [B, P + T]. positions [T]
        or [B, T]: rotary positions; null counts on from P.
        """
        past = 0 if cache is None else cache.get_seq_length()
        if positions is None:
            positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids)
        if self.embed_scale is not None:
            x = x * self.embed_scale
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        # angles stay fp32 for half-precision activations: the rotation rounds once, at its end
        wide = torch.promote_types(x.dtype, torch.float32)
        cos, sin = rope_tables(positions, self.head_dim, self.rope_theta, wide)
        if cache is None:
            context = self._context(cos, sin, document_ids)
        else:
            context = AttentionContext(cos, sin, mask=_cached_mask(input_ids, document_ids, past))
        for index, block in enumerate(self.layers):
            if cache is not None:
                context = replace(context, extend=partial(cache.update, layer_idx=index))
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, x, context, use_reentrant=False)
            else:
                x = block(x, context)
        return x if self.norm is None else self.norm(x)

    def _context(self, cos: Tensor, sin: Tensor, document_ids: Tensor | None) -> AttentionContext:
        if document_ids is None:
            return AttentionContext(cos, sin)
        first = self.layers[0]
        assert isinstance(first, Block)
        if first.self_attn.flash:
            return AttentionContext(cos, sin, cumulative=document_boundaries(document_ids))
        return AttentionContext(cos, sin, mask=document_mask(document_ids))


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

    def __init__(self, model: ModelConfig, norm: NormConfig, loss_chunk_tokens: int = 4096) -> None:
        """Build with PyTorch's default weights; `init.initialise` draws the right ones."""
        super().__init__()
        self.config, self.norm_config = model, norm
        self.model = DecoderStack(model, norm)
        self.lm_head = Head(model.hidden_size, model.vocab_size, bias=False)
        self.lm_head.chunk_tokens = loss_chunk_tokens
        if model.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; with labels [B, T] (-100: not scored) the summed cross-entropy, a scalar.

        Raises nothing for long sequences: rotary positions have no end; the config check compares
        data.sequence_length with model.max_position_embeddings.
        """
        return self.lm_head(self.model(input_ids, document_ids), labels)

    def compile_parts(self) -> None:
        """torch.compile where it pays: each block (one compilation serves all equal ones), norms and the loss."""
        for part in (*self.model.layers, self.model.embed_norm, self.model.norm):
            if part is not None:
                part.compile()
        self.lm_head.kernel = compiled_kernel()


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
