"""Models and batches that several benchmarks measure."""

from __future__ import annotations

from dataclasses import dataclass

from nexa.config.schema import Config, ModelConfig
from nexa.model.decoder import flops_per_token


@dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    model: ModelConfig
    batch: int
    """Rows of a step."""
    length: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Of a step: 6 per matrix weight and token, and attention."""
        return flops_per_token(self.model, Config().norm, self.length) * self.tokens


def _llama(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, length: int) -> Shape:
    model = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=length,
        attention="auto",
    )
    return Shape(model, batch=8, length=length)


SHAPES = {
    "34m": _llama(8192, 512, 1376, 8, 8, 256),
    "134m": _llama(32000, 768, 2048, 12, 12, 256),
    "1b": _llama(32000, 2048, 5504, 24, 32, 2048),
}
"""For CPUs (LLaMA 130M the second), and for one GPU (the 1B size with a feed-forward that is a multiple of 128)."""


def default_shape(device: str) -> str:
    """The one for a kind of device."""
    return "34m" if device == "cpu" else "1b"
