"""Measures with passes of their own: what the loss is without a block, and the gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexa.diagnostics.base import Measure, Seen, Totals, Values
from nexa.model.attention import AttentionContext
from nexa.model.decoder import Decoder


def block_inputs(decoder: Decoder, inputs: dict[str, Tensor]) -> list[tuple[Tensor, AttentionContext]]:
    """What each block reads in a forward pass of `inputs`."""
    found: list[tuple[Tensor, AttentionContext]] = []
    hooks = [block.register_forward_pre_hook(lambda module, args: found.append(args)) for block in decoder.model.layers]
    try:
        decoder.model(inputs["input_ids"], inputs.get("document_ids"))
    finally:
        for hook in hooks:
            hook.remove()
    return found


class LayerDrop(Measure):
    """How much the loss rises when a block is left out and its input goes on unchanged, for every block in turn.

    The other blocks stay the objects that they are, with their own index, scale and placement: what LNS divides block l
    by is not counted anew, and with a Post-LN block both of its norms go. Not fine-tuned after (Sun et al. 2025, arXiv
    2502.05795, section 3, take a benchmark's score instead of the loss).
    """

    def __init__(self, decoder: Decoder) -> None:
        """As `Measure`."""
        super().__init__(decoder)
        self.sums = {"loss": self.zeros(self.blocks)}

    @torch.no_grad()
    def after(self, decoder: Decoder, seen: Seen) -> None:
        """Without block i, everything before it is as it was: go on behind it from what it would have read."""
        stack, layers = decoder.model, list(decoder.model.layers)
        for left_out, (x, context) in enumerate(block_inputs(decoder, seen.inputs)):
            for block in layers[left_out + 1 :]:
                x = block(x, context)
            hidden = x if stack.norm is None else stack.norm(x)
            self.sums["loss"][left_out] += decoder.lm_head(hidden, seen.inputs["labels"])

    def result(self, totals: Totals) -> Values:
        """`loss_increase` by block, nats per token."""
        return {"loss_increase": (self.sums["loss"] / totals.tokens - totals.loss).tolist()}


class Gradients(Measure):
    """Norms of the gradient of the mean loss over all measured tokens, before any clipping.

    Needs the memory of one gradient of the model, and a decoder without gradients.
    """

    def __init__(self, decoder: Decoder) -> None:
        """Raises ValueError for a decoder that holds gradients: they would be added to."""
        super().__init__(decoder)
        self._parameters: dict[str, nn.Parameter] = dict(decoder.named_parameters())
        if any(parameter.grad is not None for parameter in self._parameters.values()):
            raise ValueError("the decoder holds gradients: set them to None before measuring")

    def after(self, decoder: Decoder, seen: Seen) -> None:
        """Add the gradient of the batch's summed loss."""
        with torch.enable_grad():
            decoder(**seen.inputs).backward()

    def result(self, totals: Totals) -> Values:
        """`gradient` by parameter, `gradient_norm` by block, `gradient_norm_rest` by other module, and the whole."""
        norms = {}
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, name
            gradient = parameter.grad if parameter.dtype == torch.float64 else parameter.grad.float()
            norms[name] = float(gradient.norm()) / totals.tokens
        blocks, rest = [0.0] * self.blocks, dict[str, float]()
        for name, norm in norms.items():
            parts = name.removeprefix("model.").split(".")
            if parts[0] == "layers":
                blocks[int(parts[1])] += norm**2
            else:
                rest[parts[0]] = rest.get(parts[0], 0.0) + norm**2
        return {
            "gradient": norms,
            "gradient_norm": [square**0.5 for square in blocks],
            "gradient_norm_rest": {name: square**0.5 for name, square in rest.items()},
            "gradient_norm_whole": sum(norm**2 for norm in norms.values()) ** 0.5,
        }

    def close(self) -> None:
        """Drop the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None
