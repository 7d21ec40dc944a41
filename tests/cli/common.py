"""A checkpoint as a run writes it, without a run."""

import json
from pathlib import Path

import torch

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.save import CheckpointWriter
from nexa.config.schema import ModelConfig, NormConfig
from nexa.interop.huggingface import config_json
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.model.statistics import tensors_of
from nexa.sharding import Shard

BYTES_VOCABULARY = 257


def tiny_model(placement: str = "pre", *, kind: str = "rmsnorm", seed: int = 0, **model: object) -> Decoder:
    """A decoder whose every parameter, norms and scales included, is away from its initial value."""
    sizes = {
        "vocab_size": BYTES_VOCABULARY + 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_theta": 500.0,
    }
    config = ModelConfig(**(sizes | model))
    norm = NormConfig(placement=placement, kind=kind, residual_gain=placement == "normformer", eps=1e-4, gate_rank=5)
    decoder = Decoder(config, norm)
    initialise(decoder, config, norm, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
            if parameter.dim() == 2:
                parameter.mul_(4)
    return decoder.eval()


def write_checkpoint(
    model: Decoder, run: Path, *, tokenizer: Path | None = None, eod_id: int = 256, sequence_length: int = 16
) -> Path:
    """A complete checkpoint of step 1 under `run`; the byte tokenizer unless a tokenizer.json is given."""
    fragments = []
    for name, tensor in tensors_of(model):
        flat = tensor.detach().reshape(-1).clone()
        fragments.append(Fragment(name, Shard.whole(tuple(tensor.shape)), 0, flat.numel(), {"weight": flat}, {}))
    config = config_json(model.config, model.norm_config, eos_token_id=eod_id)
    if tokenizer is None:
        config["nexa_tokenizer"] = "bytes"
    writer = CheckpointWriter(run / "checkpoints", asynchronous=False)
    beside = [] if tokenizer is None else [tokenizer, tokenizer.with_name("tokenizer_config.json")]
    files = {path.name: path for path in beside if path.is_file()}
    writer.save(1, fragments, {"data": {"sequence_length": sequence_length}}, config, files)
    writer.close()
    return run / "checkpoints" / "step_00000001"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
