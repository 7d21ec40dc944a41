"""The modules that an exported folder carries compute what nexa's decoder computes, without nexa."""

import ast
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexa.config.norm_checks import BHYT_PLACEMENTS
from nexa.interop.export import MODULES, standalone_config, standalone_files
from nexa.interop.huggingface import config_json
from nexa.interop.standalone.configuration_nexa import NexaConfig
from nexa.interop.standalone.modeling_nexa import NexaForCausalLM
from nexa.model.kinds import KINDS
from nexa.model.placement import PLACEMENTS
from nexa.model.statistics import tensors_of
from tests.interop.common import WITHOUT_NEXA, allowed, python, random_ids, random_model

GRID = [{"placement": p, "kind": k, "residual_gain": p == "normformer"} for p in PLACEMENTS for k in KINDS]
GRID += [{"placement": p, "qk": qk} for p in ("pre", "post", "normformer") for qk in ("rms", "rms_full", "cosine")]
GRID += [{"kind": k, "embedding": True, "final": False} for k in KINDS]
GRID += [{"placement": p, "kind": "bhyt", "bhyt_tokens": 2, "qk": "rms"} for p in BHYT_PLACEMENTS]
GRID += [{"kind": k, "pre_affine": True} for k in KINDS]
GRID += [{"placement": "normformer", "head_scale": "output"}]
GRID += [{"attention_gate": gate, "placement": p} for gate in ("elementwise", "headwise") for p in ("pre", "hybrid")]
GRID += [{"fixnorm": True, "tie_word_embeddings": tied} for tied in (False, True)]
GRID += [{"placement": "deepnorm", "final": True, "deepnorm_alpha": 1.7}, {"placement": "mix", "mix_post_layers": 3}]
GRID = [norm for norm in GRID if allowed(**norm)]
MODEL_KEYS = {"attention_gate", "fixnorm", "tie_word_embeddings"}
RUN = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from carried.configuration_nexa import NexaConfig
from carried.modeling_nexa import NexaForCausalLM
for folder in sorted(Path("grid").iterdir()):
    model = NexaForCausalLM(NexaConfig(**json.loads((folder / "config.json").read_text()))).double().eval()
    state = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (folder, missing, unexpected)
    if missing:
        model.lm_head.weight = model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(load_file("ids.safetensors")["ids"]).logits
    save_file({"logits": logits}, folder / "logits.safetensors")
try:
    import nexa
except ImportError:
    print("no nexa")
"""


def config_of(decoder):
    config = config_json(decoder.config, decoder.norm_config, eos_token_id=256)
    return config | {"model_type": "nexa"} | standalone_config(decoder.config, decoder.norm_config)


def test_every_placement_kind_and_option_without_nexa(tmp_path):
    (tmp_path / "carried").mkdir()
    for name, file in standalone_files().items():
        shutil.copy(file, tmp_path / "carried" / name)
    (tmp_path / "carried" / "__init__.py").touch()
    ids, expected = random_ids(), {}
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    for number, norm in enumerate(GRID):
        model = {"tie_word_embeddings": number % 3 == 0, "input_bias": number % 5 == 0}
        model |= {key: norm[key] for key in MODEL_KEYS & norm.keys()}
        only_norm = {key: value for key, value in norm.items() if key not in MODEL_KEYS}
        decoder = random_model(only_norm, seed=number, **model).double()
        folder = tmp_path / "grid" / f"{number:03d}"
        folder.mkdir(parents=True)
        state = {name: tensor.detach().contiguous() for name, tensor in tensors_of(decoder)}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config_of(decoder)))
        with torch.no_grad():
            expected[folder] = decoder(ids)
    assert python(WITHOUT_NEXA + 'sys.path.insert(0, "")' + RUN, home=tmp_path) == "no nexa\n"
    assert len(expected) > 95
    worst = {}
    for (folder, wanted), norm in zip(expected.items(), GRID, strict=True):
        found = load_file(folder / "logits.safetensors")["logits"]
        worst[str(norm)] = float((found - wanted).abs().max() / wanted.abs().max())
    assert {norm: error for norm, error in worst.items() if not error < 1e-12} == {}
    # the grid is no grid if everything computes the same
    different = {round(float(wanted.sum()), 6) for wanted in expected.values()}
    assert len(different) == len(expected)


def test_the_modules_need_torch_and_transformers_alone():
    for name, file in standalone_files().items():
        for node in ast.walk(ast.parse(file.read_text())):
            roots = []
            if isinstance(node, ast.Import):
                roots = [alias.name.split(".")[0] for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = [str(node.module).split(".")[0]]
            elif isinstance(node, ast.ImportFrom):
                assert f"{node.module}.py" in MODULES, name
            assert set(roots) <= {"torch", "transformers", *sys.stdlib_module_names}, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_rounds_as_the_decoder_does(dtype):
    for norm in (
        {"placement": "peri"},
        {"placement": "lns", "kind": "layernorm"},
        {"qk": "cosine"},
        {"kind": "powernorm"},
    ):
        decoder = random_model(norm)
        model = carried(decoder).to(dtype)
        ids = random_ids()
        with torch.no_grad():
            assert torch.equal(model(ids).logits, decoder.to(dtype)(ids))


def carried(decoder):
    """The standalone model with the decoder's weights."""
    model = NexaForCausalLM(NexaConfig(**config_of(decoder))).eval()
    model.load_state_dict(decoder.state_dict())
    return model


CACHED = [({"placement": p}, {}) for p in PLACEMENTS]
CACHED += [({"kind": "bhyt", "bhyt_tokens": 2}, {}), ({"placement": "normformer", "head_scale": "output"}, {})]
CACHED += [({}, {"attention_gate": "headwise", "fixnorm": True, "tie_word_embeddings": True})]


@pytest.mark.parametrize(("norm", "sizes"), CACHED, ids=str)
def test_the_cache_changes_nothing(norm, sizes):
    decoder = random_model(norm, **sizes).double()
    model, ids = carried(decoder).double(), random_ids(2, 12)
    with torch.no_grad():
        full = decoder(ids)
        past, parts = None, []
        for start, stop in [(0, 5), (5, 6), (6, 9), (9, 12)]:
            out = model(ids[:, start:stop], past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    assert (torch.cat(parts, 1) - full).abs().max() < 1e-12 * full.abs().max()


def test_generate_with_and_without_cache_and_padding():
    decoder = random_model({"placement": "hybrid"})
    model, ids, generated = carried(decoder), random_ids(2, 9), []
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    for use_cache in (True, False):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=use_cache, eos_token_id=None
        )
        generated.append(out)
    assert torch.equal(*generated)
    for row, start in ((0, 4), (1, 0)):
        alone = ids[row : row + 1, start:]
        with torch.no_grad():
            for _ in range(8):
                alone = torch.cat((alone, decoder(alone)[:, -1:].argmax(-1)), 1)
        assert torch.equal(generated[0][row, start:], alone[0])


def test_labels_and_the_last_logits():
    decoder = random_model({"placement": "sandwich"})
    model, ids = carried(decoder), random_ids()
    labels = ids.clone()
    labels[0, 7:] = -100
    with torch.no_grad():
        log_p = decoder(ids).double().log_softmax(-1)
        out = model(ids, labels=labels)
        assert torch.equal(model(ids, logits_to_keep=2).logits, out.logits[:, -2:])
    wanted = [-log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(19) if labels[b, t + 1] != -100]
    assert float(out.loss) == pytest.approx(float(sum(wanted) / len(wanted)), rel=1e-5)


def test_what_is_not_supported_is_refused():
    model = carried(random_model({"placement": "post"}))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(None, inputs_embeds=torch.zeros(1, 2, 32))
    config = config_of(random_model({"placement": "peri"}))
    config["nexa_norm"]["kind"] = "newnorm"
    with pytest.raises(ValueError, match=r"nexa_norm\.kind='newnorm'"):
        NexaForCausalLM(NexaConfig(**config))
