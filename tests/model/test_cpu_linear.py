"""The other way to the gradient of a weight is no other gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import cpu_attention, cpu_linear
from nexa.model.cpu_linear import Linear, _TurnedLinear
from nexa.model.decoder import Decoder


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 2, 5)])
def test_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in (shape, (6, 5)))
    assert torch.autograd.gradcheck(_TurnedLinear.apply, (x, weight))
    torch.testing.assert_close(_TurnedLinear.apply(x, weight), F.linear(x, weight))


def test_it_is_used_for_bf16_with_a_gradient_and_without_a_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(cpu_linear._TurnedLinear, "apply", lambda x, weight: used.append(x) or F.linear(x, weight))
    x, layer = torch.randn(3, 5), Linear(5, 6, bias=False)
    for dtype, turned, bias in (
        (torch.bfloat16, False, False),
        (torch.float32, True, False),
        (torch.bfloat16, True, True),
    ):
        layer = Linear(5, 6, bias=bias, dtype=dtype)
        layer.turned = turned
        layer(x.to(dtype))
    layer = Linear(5, 6, bias=False, dtype=torch.bfloat16)
    layer.turned = True
    with torch.no_grad():
        layer(x.bfloat16())
    assert not used
    layer(x.bfloat16())
    assert len(used) == 1


def test_a_model_that_is_compiled_uses_it_in_its_feed_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    for pays in (False, True):
        monkeypatch.setattr(cpu_attention, "pays", lambda pays=pays: pays)
        decoder = Decoder(model, NormConfig())
        decoder.compile_parts()
        turned = [name for name, layer in decoder.named_modules() if isinstance(layer, Linear) and layer.turned]
        assert turned == ([f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")] if pays else [])
