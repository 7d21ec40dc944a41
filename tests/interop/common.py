"""Models away from their initial values, and processes that have no nexa."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import torch

from nexa.config import check, from_mapping
from nexa.config.schema import ModelConfig, NormConfig
from nexa.model.decoder import Decoder
from nexa.model.init import initialise

SIZES = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
}
WITHOUT_NEXA = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {"nexa", "data_pipeline", "tests"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def random_model(norm: dict | None = None, seed: int = 0, **model: object) -> Decoder:
    """A decoder none of whose parameters, zeros included, has its initial value."""
    config, norm_config = ModelConfig(**(SIZES | model)), NormConfig(**({"eps": 1e-4, "gate_rank": 5} | (norm or {})))
    decoder = Decoder(config, norm_config)
    initialise(decoder, config, norm_config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for statistic in decoder.buffers():
            statistic.add_(torch.rand(statistic.shape, generator=generator))
    return decoder.eval()


def allowed(**norm: object) -> bool:
    """Whether the configuration check lets these settings of norm and model go together."""
    names = {field.name for field in dataclasses.fields(NormConfig)}
    groups = {"norm": {k: v for k, v in norm.items() if k in names}, "train": {"steps": 1}}
    groups["model"] = {k: v for k, v in norm.items() if k not in names}
    return not [problem for problem in check(from_mapping(groups)) if problem.startswith(("norm.", "model."))]


def random_ids(rows: int = 2, length: int = 20, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def python(code: str, *arguments: object, home: Path, **environment: str) -> str:
    """Standard output of `python -c code arguments…` in an offline process that starts in `home`."""
    env = {
        "PATH": os.environ["PATH"],
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
