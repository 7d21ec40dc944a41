"""Import, export and conversion work piece by piece: their memory does not grow with the model."""

import json

import torch
from safetensors.torch import save_file

from nexa.interop.huggingface import config_json
from tests.conftest import REPOSITORY
from tests.interop.common import python, random_model

RUN = """
import resource, sys
from nexa.interop.export import export
from nexa.interop.convert import convert
from nexa.interop.import_ import import_folder

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = []
for size in ("small", "large"):
    before.append(peak())
    import_folder(size, f"{size}-ours")
    export(f"{size}-ours", f"{size}-back", dtype="bf16", shard_bytes=60_000_000)
    convert(f"{size}-ours", f"{size}-converted", "crmsnorm")
print(peak() - before[1])
"""


def test_less_than_one_tensor_of_the_model(tmp_path):
    for name, rows in (("small", 300), ("large", 500_000)):
        model = random_model({"kind": "layernorm"}, vocab_size=300, num_hidden_layers=1)
        state = {key: value.to(torch.bfloat16) for key, value in model.state_dict().items()}
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            state[key] = torch.full((rows, 32), 0.25, dtype=torch.bfloat16)
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
        config = config_json(model.config, model.norm_config, eos_token_id=256) | {"vocab_size": rows}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    growth = int(python(RUN, home=tmp_path, PYTHONPATH=str(REPOSITORY)))
    # each of the two large tensors is 64 MB in fp32
    assert growth < 60e6, f"{growth / 1e6:.0f} MB"
