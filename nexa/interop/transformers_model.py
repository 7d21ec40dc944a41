"""nexa's decoder as a transformers model: same parameter names, `generate` with a cache, labels.

Loaded by `nexa.interop.registration`; importing it imports transformers. Works with transformers 4.50 and
later, 5 included.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nexa.interop.transformers_config import NexaConfig
from nexa.model.decoder import DecoderStack
from nexa.model.layers import Head


class NexaForCausalLM(PreTrainedModel, GenerationMixin):
    """Any placement, with transformers' growing key-value caches (`DynamicCache` and those with its interface).

    A model built from a configuration alone has transformers' default initial weights; the placements' own
    come from `nexa.build_model`.
    """

    config_class = NexaConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' own type)
    _no_split_modules = ["Block"]  # noqa: RUF012
    _supports_cache_class = True  # asked for by transformers 4

    def __init__(self, config: NexaConfig) -> None:
        """Raises UserError for a configuration that nexa does not know."""
        super().__init__(config)
        model, norm = config.parts()
        self.model = DecoderStack(model, norm)
        self.lm_head = Head(model.hidden_size, model.vocab_size, bias=model.input_bias)
        self.lm_head.fixnorm = model.fixnorm and model.tie_word_embeddings
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] for input_ids [B, T]; with labels [B, T] also their mean cross-entropy.

        As everywhere in transformers, labels are the input ids themselves (-100: not scored) and are shifted in
        here, and `logits_to_keep` asks for the logits of the last tokens only (0: all). past_key_values: a cache
        that has read P tokens before these; it reads these too. Without one, `use_cache=True` makes one.
        attention_mask [B, P + T]: 0 marks padding, left or right. position_ids [B, T]: of the rotary embedding, null
        counts on from P. Other arguments of transformers' loops are accepted and have no effect.
        Raises ValueError for inputs_embeds, a static cache, and a mask of another shape.
        """
        if kwargs.get("inputs_embeds") is not None:
            raise ValueError("inputs_embeds: not supported by nexa models")
        if getattr(past_key_values, "is_compileable", False):
            raise ValueError("past_key_values: nexa models do not support static caches; use DynamicCache")
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        seen = input_ids.shape[1] + (0 if past_key_values is None else past_key_values.get_seq_length())
        if attention_mask is not None and attention_mask.shape != (len(input_ids), seen):
            wanted = [len(input_ids), seen]
            raise ValueError(f"attention_mask: must have the shape {wanted}, has {list(attention_mask.shape)}")
        # padding is a document of its own: nothing sees it, and rotary attention knows distances only
        padded = attention_mask is not None and not bool(attention_mask.all())
        documents = attention_mask.long() if padded and attention_mask is not None else None
        hidden = self.model(input_ids, documents, past_key_values, position_ids)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

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


def register() -> None:
    """Tell transformers' auto classes; a second call changes nothing."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.register(NexaConfig, NexaForCausalLM, exist_ok=True)
