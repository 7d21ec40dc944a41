"""Conversion to RMSNorm and CRMSNorm: the same function, in fp64 to rounding, and an ordinary checkpoint."""

from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

import nexa
from nexa.checkpoint import load
from nexa.config import check, from_mapping
from nexa.config.schema import RemovalConfig
from nexa.errors import UserError
from nexa.interop import weights
from nexa.interop.convert import Converted, convert, converted, refusal
from nexa.interop.export import export
from nexa.interop.weights import parameter_shapes
from nexa.model.decoder import Decoder
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
from tests.cli.common import read_json, write_checkpoint
from tests.cli.test_main import run
from tests.interop.common import WITHOUT_NEXA, python, random_ids, random_model
from tests.model.reference import Reference

LAYERNORM = {"kind": "layernorm"}


class Memory:
    """A state dict as a source, three rows at a time; its tensors may require gradients."""

    def __init__(self, state):
        self.state = state

    def rows(self, name):
        tensor = self.state[name]
        yield from (tensor[None] if tensor.dim() == 1 else tensor).split(3)


def turned(state, decoder, target):
    """(configuration, state) of the equal of a decoder with the tensors `state`."""
    model, norm = converted(decoder.config, decoder.norm_config, target)
    made = Converted(Memory(state), decoder.config, decoder.norm_config, target)
    shapes = parameter_shapes(model, norm)
    return (model, norm), {name: torch.cat(list(made.rows(name))).reshape(shape) for name, shape in shapes.items()}


CASES = [
    ({}, {}),
    ({"placement": "lns"}, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    ({"placement": "mix", "mix_post_layers": 0, "depth_scaling": True}, {"initializer_shape": 1.0}),
    ({"embedding": True, "qk": "rms_full"}, {"num_key_value_heads": 1, "input_bias": True}),
    ({"qk": "cosine", "eps": 0.3}, {"tie_word_embeddings": True, "head_dim": 6}),
    ({"placement": "mix", "mix_post_layers": 0}, {"hidden_size": 30, "head_dim": 4, "intermediate_size": 33}),
]


@pytest.mark.parametrize("target", ["rmsnorm", "crmsnorm"])
@pytest.mark.parametrize(("norm", "model"), CASES)
def test_logits_and_gradients_in_fp64(norm, model, target):
    """The gradient of the loss by the old weights, through the conversion, is the old model's own."""
    decoder, ids = random_model(LAYERNORM | norm, **model).double(), random_ids()
    state = {name: p.detach().requires_grad_() for name, p in decoder.named_parameters()}
    configs, new = turned(state, decoder, target)
    groups = {
        "model": vars(configs[0]),
        "norm": asdict(configs[1]),
        "data": {"sequence_length": 20},
        "train": {"steps": 1},
    }
    assert check(from_mapping(groups)) == []
    loss = functional_call(Decoder(*configs).double(), new, (ids, ids.roll(1)))
    expected = decoder(ids, ids.roll(1))
    logits, wanted = functional_call(Decoder(*configs).double(), new, (ids,)), decoder(ids)
    assert (logits - wanted).abs().max() < 1e-10 * wanted.abs().max()
    loss.backward()
    expected.backward()
    for name, parameter in decoder.named_parameters():
        if name.startswith("model.embed_norm"):
            continue  # in the table's values, through which no gradient goes back to it
        found = state[name].grad
        assert (found - parameter.grad).abs().max() < 1e-9 * parameter.grad.abs().max(), name


def test_the_chain_ends_where_the_direct_way_does():
    decoder = random_model(LAYERNORM).double()
    state = dict(decoder.named_parameters())
    (model, norm), middle = turned(state, decoder, "rmsnorm")
    between = Decoder(model, norm).double()
    between.load_state_dict(middle)
    (_, last), end = turned(middle, between, "crmsnorm")
    _, direct = turned(state, decoder, "crmsnorm")
    assert last.kind == "crmsnorm" and end.keys() == direct.keys()
    for name, tensor in direct.items():
        torch.testing.assert_close(end[name], tensor, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        gains = {name for name in end if name.endswith("norm.weight")}
        assert len(gains) == 9 and all(torch.equal(end[name], torch.ones(31).double()) for name in gains)


def test_against_the_independent_model():
    """The reference knows LayerNorm, CRMSNorm and biases from the papers and shares no code with either side."""
    decoder, ids = random_model(LAYERNORM, seed=3).double(), random_ids()
    state = {name: p.detach() for name, p in decoder.named_parameters()}
    options = {"heads": 4, "kv_heads": 2, "layers": 4, "placement": "pre", "eps": 1e-4, "theta": 500.0}
    expected = Reference(state, kind="layernorm", **options).logits(ids)
    found = Reference(turned(state, decoder, "crmsnorm")[1], kind="crmsnorm", **options).logits(ids)
    assert (found - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize(("norm", "model"), CASES[:3])
def test_checkpoints(tmp_path, monkeypatch, norm, model):
    """In fp32, in small pieces, step by step, exported and opened again."""
    monkeypatch.setattr(weights, "PIECE", 100)
    decoder, ids = random_model(LAYERNORM | norm, **model), random_ids()
    source = write_checkpoint(decoder, tmp_path / "run")
    first = convert(tmp_path / "run", tmp_path / "rms", "rmsnorm")
    second = convert(tmp_path / "rms", tmp_path / "crms", "crmsnorm")
    direct = convert(source, tmp_path / "direct", "crmsnorm")
    export(second.path, tmp_path / "hf")
    with torch.no_grad():
        wanted = decoder(ids)
        for place in (first, second, direct):
            load.verify(place.path)
            opened = nexa.load_model(place.path)
            assert (opened(ids) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        from transformers import AutoModelForCausalLM

        again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert (again(ids).logits - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (second.model.hidden_size, second.model.tie_word_embeddings) == (decoder.config.hidden_size - 1, False)
    assert second.model == direct.model and second.norm == direct.norm
    assert read_json(second.path / "config.json")["nexa_tokenizer"] == "bytes"
    assert load.read_state(first.path)["converted_from"] == str(source)


def test_an_export_opens_without_nexa(tmp_path):
    decoder, ids = random_model(LAYERNORM), random_ids()
    write_checkpoint(decoder, tmp_path / "run")
    export(convert(tmp_path / "run", tmp_path / "crms", "crmsnorm").path, tmp_path / "hf")
    code = f"""
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)
save_file({{"y": model(torch.tensor({ids.tolist()})).logits.detach()}}, "y.safetensors")
"""
    python(WITHOUT_NEXA + code, home=tmp_path)
    with torch.no_grad():
        wanted = decoder(ids)
    assert (load_file(tmp_path / "y.safetensors")["y"] - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize(("norm", "model"), CASES[:4])
def test_constant_norms_move_into_the_matrices(norm, model, kind):
    """With the fixed scale of LNS, an embedding norm, a tied head; without biases where the kind has none."""
    norm = norm | {"kind": kind, "removal": RemovalConfig(start=1)}
    decoder, ids = random_model(norm, **model).double(), random_ids()
    with torch.no_grad():
        for name, buffer in decoder.named_buffers():
            buffer.fill_(1.0 if name.endswith("removed") else 0.3 + torch.rand(()))
    state = {name: tensor.detach() for name, tensor in decoder.state_dict().items()}
    configs, new = turned(state, decoder, "none")
    assert configs[0].input_bias == (kind == "layernorm" or model.get("input_bias", False))
    assert not any("layernorm" in name for name in new)
    bare = Decoder(*configs).double()
    bare.load_state_dict(new)
    with torch.no_grad():
        wanted = decoder(ids)
        assert (bare(ids) - wanted).abs().max() < 1e-10 * wanted.abs().max()


def test_what_has_no_equal():
    """Of all placements and kinds; the two that pass are those that the first test converts."""
    model = random_model().config
    passes = set()
    for placement in PLACEMENTS:
        for kind in KINDS:
            norm = from_mapping({"norm": {"placement": placement, "kind": kind}}).norm
            if refusal(model, norm, "crmsnorm") is None:
                passes.add((placement, kind))
    assert passes == {(p, k) for p in ("pre", "lns") for k in ("layernorm", "rmsnorm")}


@pytest.mark.parametrize(
    ("norm", "to", "message"),
    [
        ({"kind": "dyt"}, "rmsnorm", "norm.kind=dyt: only layernorm"),
        ({"kind": "rmsnorm"}, "rmsnorm", "norm.kind=rmsnorm: it is that already"),
        ({"kind": "rmsnorm"}, "crmsnorm", "model.embed_tokens.weight writes a mean"),
        ({"kind": "rmsnorm", "embedding": True}, "crmsnorm", "norm.embedding=true"),
        (
            {"kind": "layernorm", "placement": "post"},
            "rmsnorm",
            "norm.placement=post: block 0 has a norm with no linear",
        ),
        ({"kind": "layernorm", "placement": "mix"}, "rmsnorm", "norm.placement=mix: block 0"),
        ({"kind": "layernorm", "placement": "reordered"}, "rmsnorm", "norm.placement=reordered: block 0"),
        ({"kind": "layernorm", "placement": "normformer"}, "crmsnorm", "norm.placement=normformer: block 0"),
        ({"kind": "layernorm", "final": False}, "rmsnorm", "norm.final=false: the head reads"),
        ({"kind": "layernorm", "placement": "none"}, "rmsnorm", "norm.placement=none: a sublayer of block 0 reads"),
        ({"kind": "layernorm", "residual_gain": True}, "rmsnorm", "norm.residual_gain=True: conversion has no rule"),
        ({"kind": "layernorm"}, "none", "norm.removal.start=null"),
    ],
)
def test_mistakes_end_with_code_2_and_nothing_written(tmp_path, capsys, norm, to, message):
    write_checkpoint(random_model(norm), tmp_path / "run")
    code, out, err = run(capsys, "convert", tmp_path / "run", tmp_path / "out", "--to", to)
    assert (code, out) == (2, "")
    assert message in err and err.count("nexa: error:") == 1 and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_places_and_damage(tmp_path, capsys):
    checkpoint = write_checkpoint(random_model(LAYERNORM), tmp_path / "run")
    for arguments, message in [
        (("convert", tmp_path / "gone", tmp_path / "out", "--to", "rmsnorm"), "gone does not exist"),
        (("convert", checkpoint, checkpoint, "--to", "rmsnorm"), "exists and is not empty"),
        (("convert", checkpoint, tmp_path / "out", "--to", "layernorm"), "--to"),
        (("convert", checkpoint, tmp_path / "out"), "--to"),
    ]:
        code, _, err = run(capsys, *arguments)
        assert code == 2 and message in err
    file = next(checkpoint.glob("model*.safetensors"))
    file.write_bytes(file.read_bytes()[:-4])
    code, _, err = run(capsys, "convert", checkpoint, tmp_path / "out", "--to", "rmsnorm")
    assert code == 2 and file.name in err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_tensor_without_a_rule(tmp_path):
    """A table of names, so that a tensor of tomorrow is not copied as if it did not read the residual stream."""
    from nexa.interop.convert import check_known

    decoder = random_model(LAYERNORM)
    shapes = parameter_shapes(decoder.config, decoder.norm_config)
    check_known(shapes, decoder.config, decoder.norm_config)
    for name in ("model.layers.1.self_attn.gate.weight", "model.layers.0.mlp.residual_gain", "model.new.weight"):
        with pytest.raises(UserError, match=f"{name}: conversion has no rule"):
            check_known(shapes | {name: (3,)}, decoder.config, decoder.norm_config)


def test_the_command_says_how_to_train_on(tmp_path, capsys):
    write_checkpoint(random_model(LAYERNORM), tmp_path / "run")
    code, out, _ = run(capsys, "convert", tmp_path / "run", tmp_path / "out", "--to", "crmsnorm")
    assert code == 0
    words = out.splitlines()[-1].split()
    for word in ("resume.mode=weights_only", "model.hidden_size=31", "model.head_dim=8", "model.input_bias=true"):
        assert word in words
    assert "norm.kind=crmsnorm" in words and "norm.embedding=true" not in words
