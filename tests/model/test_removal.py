"""Norms that become constants: which, when, and what they compute before and after."""

import copy

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig, RemovalConfig
from nexa.model.decoder import Decoder
from nexa.model.removal import Removable, removed_after, sites

MODEL = ModelConfig(vocab_size=53, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4)


def pair(kind: str, **norm) -> tuple[Decoder, Decoder]:
    """(plain, removable) with the same random weights, fp64."""
    torch.manual_seed(0)
    plain = Decoder(MODEL, NormConfig(kind=kind, eps=1e-2, **norm)).double()
    removable = Decoder(MODEL, NormConfig(kind=kind, eps=1e-2, removal=RemovalConfig(start=5), **norm)).double()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3 + (parameter.dim() == 1))
            removable.get_parameter(name).copy_(parameter)
    return plain, removable


def test_the_order_and_the_steps() -> None:
    removal = RemovalConfig(start=7, every=3)
    names = sites(removal, 2)
    assert names == [
        "model.layers.0.post_attention_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.layers.0.input_layernorm",
        "model.layers.1.input_layernorm",
        "model.norm",
    ]
    assert [removed_after(removal, step) for step in (0, 6, 7, 8, 9, 10, 19)] == [0, 0, 1, 1, 1, 2, 5]
    assert removed_after(RemovalConfig(), 10**6) == 0
    assert sites(RemovalConfig(order=["final", "attention"]), 1) == ["model.norm", "model.layers.0.input_layernorm"]


@pytest.mark.parametrize("placement", ["pre", "lns"])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_before_it_is_the_norm_itself(kind: str, placement: str) -> None:
    plain, removable = pair(kind, placement=placement, embedding=True)
    ids = torch.randint(0, 53, (2, 9))
    torch.testing.assert_close(removable(ids), plain(ids), rtol=1e-12, atol=1e-12)
    for model in (plain, removable):
        model(ids, ids.roll(1)).backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(removable.get_parameter(name).grad, parameter.grad, rtol=1e-10, atol=1e-12)
    tracked = {name for name, module in removable.named_modules() if isinstance(module, Removable)}
    assert tracked == set(sites(RemovalConfig(), 3))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_after_it_is_linear(kind: str) -> None:
    _, model = pair(kind)
    norm, x = model.model.layers[1].input_layernorm, torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    norm.removed.fill_(1.0)
    norm.fixed_rms.fill_(2.5)
    centred = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    expected = norm.weight * centred / 2.5 + (norm.bias if kind == "layernorm" else 0.0)
    torch.testing.assert_close(norm(x), expected)
    found, wanted = (torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in (norm(x), expected))
    torch.testing.assert_close(found, wanted)
    assert norm.fixed_rms.requires_grad is False


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sums_of_a_step(compiled: bool) -> None:
    """Of training passes alone, of every token once, compiled or not."""
    _, model = pair("layernorm")
    norm = copy.deepcopy(model.model.norm).float()
    if compiled:
        norm.compile()
    x = torch.randn(3, 4, 24)
    norm(x)  # nobody asks yet
    norm.tally = torch.zeros(2)
    norm(x)
    norm(2 * x[:1])
    lengths = [torch.sqrt(part.var(-1, correction=0) + 1e-2) for part in (x, 2 * x[:1])]
    expected = torch.stack((sum(each.sum() for each in lengths), torch.tensor(16.0)))
    torch.testing.assert_close(norm.tally, expected)
    norm.eval()(x)
    torch.testing.assert_close(norm.tally, expected)
