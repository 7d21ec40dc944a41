"""Every measure against a float64 computation by hand, whatever the batching."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch

from nexa.config.schema import ModelConfig, NormConfig
from nexa.diagnostics import MEASURES, measure
from nexa.diagnostics import logits as logits_module
from nexa.diagnostics import streams as streams_module
from nexa.diagnostics.streams import growth
from nexa.model.attention import AttentionContext, document_boundaries, document_mask
from nexa.model.decoder import Decoder
from tests.cli.common import tiny_model
from tests.diagnostics.naive import by_hand, recorder

PLACEMENTS = ["pre", "post", "lns", "hybrid_star", "deepnorm", "peri"]
WIDTHS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}


def model_of(placement, **options):
    return tiny_model(placement, **(WIDTHS | options)).double()


def batch(rows=4, length=7, documents=False, seed=0):
    """Random sequences: one padded from its third token on, one that scores nothing."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 257, (rows, length + 1), generator=generator)
    inputs = {"input_ids": ids[:, :-1].clone(), "labels": ids[:, 1:].clone()}
    inputs["labels"][1, 3:] = -100
    inputs["labels"][2] = -100
    if documents:
        inputs["document_ids"] = (torch.rand(rows, length, generator=generator) < 0.3).int().cumsum(-1)
    return inputs


def same(found, expected, where="", **tolerance):
    if isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{number}]", **tolerance)
    else:
        assert found == pytest.approx(expected, **({"rel": 1e-8, "abs": 1e-10} | tolerance)), where


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_forward_measures(placement, documents):
    model, inputs = model_of(placement), batch(documents=documents)
    found = measure(model, [inputs])
    expected = by_hand(model, inputs)
    assert found.loss == pytest.approx(expected.pop("loss"), rel=1e-9)
    assert (found.tokens, found.sequences, found.blocks) == (7 + 3 + 7, 3, 4)
    for name, values in expected.items():
        # arccos takes the root of a rounding error where two streams are parallel, as on the diagonal
        same(found.values[name], values, name, **({"abs": 1e-7} if name.startswith("angular") else {}))


@pytest.mark.parametrize("branch_scale", get_args(get_type_hints(NormConfig)["branch_scale"]))
@pytest.mark.parametrize("placement", ["pre", "peri"])
def test_additions_make_the_stream(placement, branch_scale):
    """Where no norm stands behind the sum, what attention adds is the difference that the block makes without the
    feed-forward, whatever it is multiplied with."""
    seen: list[torch.Tensor] = []
    cfg = model_of("pre").config
    model = Decoder(cfg, NormConfig(placement=placement, branch_scale=branch_scale)).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1)
    hook = model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output - args[0]))
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    found = measure(model, [batch()], ["added"]).values
    hook.remove()
    counted = (batch()["labels"] >= 0).flatten()
    assert found["feed_forward_variance"][1] == 0
    expected = float(seen[0].flatten(0, 1)[counted].var(-1, correction=0).mean())
    assert found["attention_variance"][1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_layer_drop_keeps_the_other_blocks(placement):
    """A model built by hand without block i, whose blocks keep their own scale and place in the plan."""
    model, inputs = model_of(placement), batch()
    found = measure(model, [inputs], ["layer_drop"])
    for left_out in range(4):
        one, total = recorder(model), 0.0
        for ids, labels in zip(inputs["input_ids"], inputs["labels"], strict=True):
            x, T = one.s["model.embed_tokens.weight"][ids][None], len(ids)
            for i in range(4):
                if i != left_out:
                    x = one.block(i, x, torch.tril(torch.ones(T, T, dtype=torch.bool))[None, None])
            total += float(one.nll(x[0], labels))
        expected = total / found.tokens - found.loss
        assert found.values["loss_increase"][left_out] == pytest.approx(expected, rel=1e-8, abs=1e-10)
        assert abs(expected) > 1e-6


def test_layer_drop_does_not_number_lns_anew():
    """A smaller LNS model made of the remaining blocks has other scales: that is not what is measured."""
    model, inputs = model_of("lns"), batch()
    found = measure(model, [inputs], ["layer_drop"])
    smaller = model_of("lns", num_hidden_layers=3)
    state = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[2] == "0":
                continue
            parts[2] = str(int(parts[2]) - 1)
        state[".".join(parts)] = value
    smaller.load_state_dict(state)
    with torch.no_grad():
        renumbered = float(smaller(**inputs)) / found.tokens
        for block, plan in zip(smaller.model.layers, model.model.layers[1:], strict=True):
            block.plan = plan.plan
        kept = float(smaller(**inputs)) / found.tokens
    assert found.values["loss_increase"][0] == pytest.approx(kept - found.loss, rel=1e-8)
    assert abs(renumbered - kept) > 1e-3


@pytest.mark.parametrize("placement", ["pre", "deepnorm"])
def test_gradients(placement):
    model, inputs = model_of(placement), batch()
    found = measure(model, [{k: v[:2] for k, v in inputs.items()}, {k: v[2:] for k, v in inputs.items()}], ["gradient"])
    assert all(parameter.grad is None for parameter in model.parameters())
    state = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    one = recorder(model)
    one.s = state
    rows = zip(inputs["input_ids"], inputs["labels"], strict=True)
    (sum(one.nll(one.streams(ids)[-1], labels) for ids, labels in rows) / found.tokens).backward()
    squares = {name: float(value.grad.square().sum()) for name, value in state.items()}
    assert found.values["gradient"].keys() == squares.keys()
    for name, square in squares.items():
        assert found.values["gradient"][name] == pytest.approx(math.sqrt(square), rel=1e-8, abs=1e-14), name
    for i, norm in enumerate(found.values["gradient_norm"]):
        own = sum(square for name, square in squares.items() if name.startswith(f"model.layers.{i}."))
        assert norm == pytest.approx(math.sqrt(own), rel=1e-8)
    rest = found.values["gradient_norm_rest"]
    assert set(rest) == {"embed_tokens", "lm_head"} | ({"norm"} if placement == "pre" else set())
    assert rest["embed_tokens"] == pytest.approx(math.sqrt(squares["model.embed_tokens.weight"]), rel=1e-8)
    assert found.values["gradient_norm_whole"] == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-8)


def test_gradients_are_not_added_to_others():
    model = model_of("pre")
    model(**batch()).backward()
    with pytest.raises(ValueError, match="holds gradients"):
        measure(model, [batch()], ["gradient"])


def test_whatever_the_batching(monkeypatch):
    model, inputs = model_of("pre"), batch(rows=6, documents=True)
    whole = measure(model, [inputs])
    monkeypatch.setattr(logits_module, "LOGITS", 4 * 7 * 3)
    monkeypatch.setattr(streams_module, "ANGLE_ELEMENTS", 5 * 16 * 2)
    pieces = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(6)]
    pieces = [{k: torch.cat((pieces[0][k], pieces[1][k])) for k in inputs}, *pieces[2:]]
    assert not (pieces[1]["labels"] >= 0).any()
    apart = measure(model, pieces)
    assert (whole.tokens, whole.sequences) == (apart.tokens, apart.sequences)
    assert apart.loss == pytest.approx(whole.loss, rel=1e-12)
    for name, values in whole.values.items():
        if isinstance(values, dict):
            values, other = list(values.values()), list(apart.values[name].values())
        else:
            other = apart.values[name]
        same(other, values, name, abs=1e-7 if name.startswith("angular") else 1e-11)


def test_padding_does_not_count():
    model, inputs = model_of("pre"), batch()
    other = {key: value.clone() for key, value in inputs.items()}
    other["input_ids"][1, 4:] = 11
    other["input_ids"][2] = 12
    first, second = measure(model, [inputs]), measure(model, [other])
    assert first.values["variance"] == second.values["variance"]
    assert first.values["logit_max"] == second.values["logit_max"]
    assert first.values["top1"] == second.values["top1"]


def test_massive_activations_are_counted():
    model, inputs = model_of("pre"), batch()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] = 5000.0
        model.model.embed_tokens.weight[:, 4] = 90.0
    found = measure(model, [inputs], ["massive", "sinks"]).values
    expected = by_hand(model, inputs)
    assert found["massive_count"][0] == (7 + 3 + 7) / 3 == expected["massive_count"][0]
    assert found["channel_ratio"][0] == pytest.approx(expected["channel_ratio"][0])
    assert found["top1"][0] == 5000


@pytest.mark.parametrize("qk", ["rms", "rms_full", "cosine"])
def test_logits_are_those_of_the_softmax(qk):
    """Attention made again from the logits' own pieces gives what the kernel gave."""
    torch.manual_seed(0)
    cfg = ModelConfig(64, 16, 24, 1, 4, 2, max_position_embeddings=32)
    model = Decoder(cfg, NormConfig(qk=qk)).double()
    seen = {}
    attention = model.model.layers[0].self_attn
    attention.watch = lambda q, k, scale: seen.update(q=q, k=k, scale=scale)
    inputs = {"input_ids": torch.arange(12).view(2, 6), "labels": torch.arange(12).view(2, 6)}
    attention.o_proj.register_forward_pre_hook(lambda module, args: seen.update(y=args[0]))
    with torch.no_grad():
        model(**inputs)
    q, k = seen["q"].transpose(1, 2), seen["k"].transpose(1, 2).repeat_interleave(2, 1)
    scores = (q @ k.transpose(-1, -2) * seen["scale"]).tril()
    attention.watch = None
    found = measure(model, [inputs], ["attention"]).values
    assert found["logit_max"] == [pytest.approx(float(scores.abs().max()), rel=1e-9)]
    v = attention.v_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(inputs["input_ids"])))
    v = v.view(2, 6, 2, 4).transpose(1, 2)
    causal = scores.masked_fill(~torch.ones(6, 6, dtype=torch.bool).tril(), -math.inf).softmax(-1)
    y = (causal @ v.repeat_interleave(2, 1)).transpose(1, 2).reshape(2, 6, 16)
    torch.testing.assert_close(y, seen["y"])


def test_documents_of_the_variable_length_kernel_are_those_of_the_mask():
    documents = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    tables = torch.zeros(5, 2)
    masked = AttentionContext(tables, tables, (2, 5), mask=document_mask(documents))
    offsets = AttentionContext(tables, tables, (2, 5), cumulative=document_boundaries(documents))
    for row in range(2):
        for start, stop in ((0, 5), (2, 4)):
            one = logits_module.visible(masked, row, start, stop, stop)
            assert torch.equal(one, logits_module.visible(offsets, row, start, stop, stop))


def test_growth_exponent():
    assert growth([7.0, 9.0, *(3 * number**1.5 for number in range(2, 9))]) == pytest.approx((1.5, 1.0))
    x = [math.log(number) for number in range(2, 7)]
    y = [0.3, 0.1, 0.9, 0.7, 1.6]
    slope, intercept = torch.linalg.lstsq(
        torch.tensor([[a, 1.0] for a in x], dtype=torch.float64), torch.tensor(y, dtype=torch.float64)[:, None]
    ).solution.flatten()
    rest = sum((b - float(slope) * a - float(intercept)) ** 2 for a, b in zip(x, y, strict=True))
    spread = sum((b - sum(y) / 5) ** 2 for b in y)
    assert growth([1.0, 1.0, *map(math.exp, y)]) == pytest.approx((float(slope), 1 - rest / spread))
    assert growth([1.0, 2.0, 3.0, 4.0]) == (None, None)
    assert growth([1.0, 2.0, 3.0, 0.0, 1.0]) == (None, None)
    assert growth([1.0] * 6) == (0.0, 1.0)


def test_the_decoder_is_left_as_it_was():
    model = model_of("peri").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(**batch())
    measure(model, [batch()])
    assert model.training
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and all(block.self_attn.watch is None for block in model.model.layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch()), expected)


def test_compiled_parts_are_seen_and_stay_compiled():
    model, inputs = model_of("pre"), batch()
    expected = measure(model, [inputs])
    compilations = []

    def backend(graph, examples):
        compilations.append(graph)
        return graph.forward

    for block in model.model.layers:
        block.compile(backend=backend)
    logits = model(inputs["input_ids"])
    before = len(compilations)
    assert before > 0
    assert measure(model, [inputs]) == expected
    assert torch.equal(model(inputs["input_ids"]), logits)
    assert len(compilations) == before, "measuring made the compiler work again"
    assert all(block._compiled_call_impl is not None for block in model.model.layers)


def test_bad_calls():
    model = model_of("pre")
    with pytest.raises(KeyError, match="nothing"):
        measure(model, [batch()], ["nothing"])
    with pytest.raises(ValueError, match="no batch has a scored token"):
        measure(model, [{"input_ids": torch.zeros(1, 3).long(), "labels": torch.full((1, 3), -100)}])


def test_rows_for_metrics():
    model = model_of("pre")
    rows = measure(model, [batch()], ["variance", "attention", "angles"]).rows()
    assert {"variance/embedding", "variance/0", "variance/3", "logit_max/0", "logit_max/3"} <= rows.keys()
    assert "logit_max/embedding" not in rows and not any(name.startswith("angular") for name in rows)
    assert all(isinstance(value, float) for value in rows.values())


def test_progress_and_table():
    told = []
    assert set(measure(model_of("pre"), [batch(), batch(seed=1)], ["variance"], progress=told.append).values)
    assert told == [17, 34]
    assert list(MEASURES) == [
        "variance", "added", "influence", "angles", "massive", "sinks", "attention", "layer_drop", "gradient",
    ]  # fmt: skip
