"""Grown models in memory, without files."""

from __future__ import annotations

from pathlib import Path

import torch

from nexa.checkpoint.fragment import Fragment
from nexa.checkpoint.save import CheckpointWriter
from nexa.growth.operators import Growth
from nexa.growth.target import Target, plan
from nexa.growth.tensors import Grown
from nexa.interop.huggingface import config_json
from nexa.model.decoder import Decoder
from nexa.model.statistics import tensors_of
from nexa.sharding import Shard


class Entry:
    """What a tensor's entry in a file says."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.numel = tuple(tensor.shape), tensor.numel()


class Memory:
    """A dict of tensors in the place of a `WeightFolder`."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.entries = {name: Entry(tensor) for name, tensor in tensors.items()}

    def read(self, name: str, start: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        return self.tensors[name].flatten()[start : start + count].to(dtype)

    def chunks(self, name: str, dtype: torch.dtype):
        yield from self.tensors[name].flatten().to(dtype).split(7)


def weights_of(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in tensors_of(decoder)}


def grown_tensors(decoder: Decoder, saved: dict[str, torch.Tensor] | None = None, /, **growth):
    """(Target, {key: tensor}) of a decoder that grows; `saved`: optimizer state as in a file."""
    target: Target = plan(decoder.config, decoder.norm_config, Growth(**growth))
    made = Grown(target, Memory(weights_of(decoder)), Memory(saved or {}))
    keys = dict.fromkeys(made.shapes)
    states = {key.split("/")[0] for key in saved or {}}
    keys |= {f"{state}/{name}": None for state in states for name in made.shapes}
    result = {
        key: torch.cat(list(made.chunks(key, torch.float32))).view(made.shapes[key.rpartition("/")[2]]) for key in keys
    }
    return target, result


def grown_model(decoder: Decoder, **growth) -> Decoder:
    target, tensors = grown_tensors(decoder, **growth)
    model = Decoder(target.model, target.norm)
    named = dict(tensors_of(model))
    assert named.keys() == tensors.keys()
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(tensors[name])
    return model.eval()


def moments_of(decoder: Decoder, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random moments of every parameter, as in a file."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in decoder.named_parameters():
        found[f"exp_avg/{name}"] = torch.randn(parameter.shape, generator=generator)
        found[f"exp_avg_sq/{name}"] = torch.rand(parameter.shape, generator=generator)
    return found


STATE = {
    "state": {"step": 7, "samples": 56, "tokens": 896, "skipped": 0},
    "data": {"seed": 5, "sequence_length": 16},
    "optim": {"lr": 1e-3},
    "total_steps": 20,
    "stage_starts": [],
    "tokens_by_source": {"a": 896},
}


def write_trained(decoder: Decoder, root: Path, moments: dict[str, torch.Tensor] | None = None) -> Path:
    """A checkpoint of step 7 with optimizer state."""
    moments = moments_of(decoder) if moments is None else moments
    fragments = []
    for name, tensor in tensors_of(decoder):
        flat = {"weight": tensor.detach().reshape(-1).clone()}
        for state in ("exp_avg", "exp_avg_sq"):
            if f"{state}/{name}" in moments:
                flat[state] = moments[f"{state}/{name}"].reshape(-1).clone()
        scalars = {"step": 7.0} if len(flat) > 1 else {}
        fragments.append(Fragment(name, Shard.whole(tuple(tensor.shape)), 0, tensor.numel(), flat, scalars))
    writer = CheckpointWriter(root, asynchronous=False)
    config = config_json(decoder.config, decoder.norm_config, eos_token_id=256) | {"nexa_tokenizer": "bytes"}
    writer.save(7, fragments, STATE, config)
    writer.close()
    return root / "step_00000007"
