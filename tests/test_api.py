"""The names in `nexa` itself."""

import pytest
import torch

import nexa
from nexa.errors import UserError
from tests.cli.common import tiny_model, write_checkpoint
from tests.conftest import run_command

IMPORT = """
import sys, time
begin = time.process_time()
import nexa
seconds = time.process_time() - begin
heavy = [name for name in ("torch", "transformers", "hydra", "numpy", "deepspeed") if name in sys.modules]
print(seconds, heavy, nexa.__version__)
"""
SHRUNK = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_attention_heads=4",
    "model.num_key_value_heads=2",
    "model.num_hidden_layers=2",
    "model.vocab_size=260",
]


def test_import_is_light():
    done = run_command("-c", IMPORT)
    seconds, rest = done.stdout.split(" ", 1)
    assert rest == f"[] {nexa.__version__}\n", done.stderr
    assert float(seconds) < 0.3


def test_unknown_names_are_attribute_errors():
    assert not hasattr(nexa, "no_such_name")
    assert set(nexa._HOMES) < set(nexa.__all__)


def test_build_model_is_a_pure_function_of_the_overrides():
    first, second = (
        nexa.build_model([*SHRUNK, "norm.placement=peri"]),
        nexa.build_model([*SHRUNK, "norm.placement=peri"]),
    )
    other = nexa.build_model([*SHRUNK, "norm.placement=peri", "train.seed=5"])
    assert "model.layers.1.mlp_norm.output.weight" in first.state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    assert first(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 260)


def test_build_model_names_what_is_wrong():
    with pytest.raises(UserError, match=r"model\.num_attention_heads"):
        nexa.build_model([*SHRUNK, "model.num_attention_heads=5"])


@pytest.mark.parametrize("tied", [False, True])
def test_load_model_from_a_run_or_a_checkpoint(tmp_path, tied):
    model = tiny_model("mix", tie_word_embeddings=tied)
    path = write_checkpoint(model, tmp_path)
    ids = torch.arange(20)[None]
    for place in (path, tmp_path, str(tmp_path)):
        loaded = nexa.load_model(place)
        assert not loaded.training
        assert torch.equal(loaded(ids), model(ids))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_load_state_takes_checkpoint_names():
    model, other = tiny_model("peri"), tiny_model("peri", seed=1)
    nexa.load_state(other, model.state_dict())
    ids = torch.arange(9)[None]
    assert torch.equal(other(ids), model(ids))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_flipped_byte_is_found(tmp_path, file):
    path = write_checkpoint(tiny_model(), tmp_path)
    (target,) = path.glob(file) if (path / file).exists() else [next(path.glob("model*.safetensors"))]
    content = bytearray(target.read_bytes())
    content[-40] ^= 1
    target.write_bytes(content)
    with pytest.raises(UserError, match=target.name):
        nexa.load_model(path)


def test_no_marker_is_no_checkpoint(tmp_path):
    path = write_checkpoint(tiny_model(), tmp_path)
    (path / "COMPLETE").unlink()
    with pytest.raises(UserError, match="COMPLETE"):
        nexa.load_model(path)
