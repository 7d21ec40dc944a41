"""nexa's decoder as a transformers model: same parameter names, `generate`, labels.

Loaded by `nexa.interop.registration`; importing it imports transformers. Works with transformers 4.50 and
later, 5 included.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nexa.interop.transformers_config import NexaConfig
from nexa.model.decoder import DecoderStack
from nexa.model.layers import Head


class NexaForCausalLM(PreTrainedModel, GenerationMixin):
    """Any placement. There is no key-value cache: each new token of `generate` computes the whole sequence.

    A model built from a configuration alone has transformers' default initial weights; the placements' own
    come from `nexa.build_model`.
    """

    config_class = NexaConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012  (transformers' own type)
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, config: NexaConfig) -> None:
        """Raises UserError for a configuration that nexa does not know."""
        super().__init__(config)
        model, norm = config.parts()
        self.model = DecoderStack(model, norm)
        self.lm_head = Head(model.hidden_size, model.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V] for input_ids [B, T]; with labels [B, T] also their mean cross-entropy.

        As everywhere in transformers, labels are the input ids themselves (-100: not scored) and are shifted in
        here. attention_mask [B, T]: 0 marks padding, left or right. Other arguments of transformers' loops are
        accepted and have no effect. Raises ValueError for inputs_embeds and a key-value cache.
        """
        for name in ("inputs_embeds", "past_key_values"):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name}: not supported by nexa models")
        # padding is a document of its own: nothing sees it, and rotary attention knows distances only
        padded = attention_mask is not None and not bool(attention_mask.all())
        hidden = self.model(input_ids, attention_mask.long() if padded and attention_mask is not None else None)
        logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(  # type: ignore[override]  # the arguments differ between releases
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The whole sequence, each time."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

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
