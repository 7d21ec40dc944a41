"""The other ways to the products of a linear layer lead to the same ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nexa.config.schema import ModelConfig, NormConfig
from nexa.model import cpu_linear
from nexa.model.cpu_linear import Linear, OneDnn, Turned
from nexa.model.decoder import Decoder

Ways = dict[torch.dtype, type[torch.autograd.Function]]


@pytest.mark.parametrize("shape", [(7, 5), (3, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("way", [Turned, OneDnn])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients(shape: tuple[int, ...], way: type[torch.autograd.Function], compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(size, generator=generator, requires_grad=True) for size in (shape, (6, 5)))

    def apply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return way.apply(x.sin(), weight)  # type: ignore[no-any-return]

    y = (torch.compile(apply) if compiled else apply)(x, weight)
    exact = F.linear(x.double().sin(), weight.double())
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-6)
    dy = torch.randn(y.shape, generator=generator)
    for mine, true in zip(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(exact, (x, weight), dy.double()), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-6)


def test_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(Turned, "apply", lambda x, weight: used.append(x) or F.linear(x, weight))
    for dtype, ways, bias in (
        (torch.bfloat16, {}, False),
        (torch.float32, {torch.bfloat16: Turned}, False),
        (torch.bfloat16, {torch.bfloat16: Turned}, True),
    ):
        layer = Linear(5, 6, bias=bias, dtype=dtype)
        layer.ways = ways
        layer(torch.randn(3, 5, dtype=dtype))
    layer = Linear(5, 6, bias=False, dtype=torch.bfloat16)
    layer.ways = {torch.bfloat16: Turned}
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
    assert not used
    layer(x)
    assert len(used) == 1


@pytest.mark.parametrize(
    ("name", "units", "attention", "feed_forward"),
    [
        ("AMD EPYC 9654", {"avx512_f", "avx512_bf16"}, {torch.float32: OneDnn}, {torch.float32: OneDnn}),
        ("AMD EPYC 7763", {"avx2"}, {}, {}),
        ("Intel(R) Xeon(R) Platinum 8481C", {"avx512_f", "amx_bf16"}, {}, {torch.bfloat16: Turned}),
        ("", set(), {}, {}),
    ],
)
def test_what_pays_where(
    name: str, units: set[str], attention: Ways, feed_forward: Ways, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_linear, "cpu_name", lambda: name)
    monkeypatch.setattr(cpu_linear, "cpu_units", lambda: units)
    model = ModelConfig(vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    decoder = Decoder(model, NormConfig())
    layers = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, Linear)}
    assert layers and not any(layer.ways for layer in layers.values()), "nothing before it is compiled"
    decoder.compile_parts()
    for name, layer in layers.items():
        assert layer.ways == (feed_forward if ".mlp." in name else attention), name
