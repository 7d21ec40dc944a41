"""Other trainers' models, each installed into an environment of its own and run there by a process that takes turns.

Environments lie in build/peers, with the torch version that nexa runs on, and are made once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import Shape

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parent / "build" / "peers"
Turn = Callable[[int], tuple[list[float], float]]
"""Takes so many steps: seconds of each, and the loss of the last."""
REQUIREMENTS = {"litgpt": ("litgpt==0.5.13",), "torchtitan": ("torchtitan==0.3.0", "triton")}
"""The versions whose figures docs/benchmarks.md gives."""


def environment(name: str) -> Path:
    """The Python of a peer's environment, made when it is not there. CalledProcessError when pip fails."""
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if not ready.exists():
        print(f"installing {' '.join(REQUIREMENTS[name])} into {folder} (once)", file=sys.stderr)
        venv.create(folder, with_pip=True, clear=True)
        whole = torch.__version__
        version = whole if whole.endswith("+cpu") else whole.partition("+")[0]  # else pip takes gigabytes for CUDA
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, f"torch=={version}", *REQUIREMENTS[name]], check=True)
        ready.touch()
    return python


def peer(name: str, device: torch.device, shape: Shape, precision: str, weights: dict[str, Tensor]) -> Turn:
    """A peer, ready to take turns.

    weights: the initial ones, by nexa's names.
    """
    python, folder = environment(name), ENVIRONMENTS / name
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "weights.safetensors")
    job = {**the_job(device, shape, precision), "weights": str(folder)}
    return turns([str(python), str(HERE / f"peer_{name}.py"), json.dumps(job)], name)


def the_job(device: torch.device, shape: Shape, precision: str) -> dict[str, object]:
    """What `peer_turns.the_job` reads."""
    model = shape.model
    return {
        "vocab": model.vocab_size,
        "width": model.hidden_size,
        "inner": model.intermediate_size,
        "layers": model.num_hidden_layers,
        "heads": model.num_attention_heads,
        "eps": model.rms_norm_eps,
        "theta": model.rope_theta,
        "rows": shape.batch,
        "length": shape.length,
        "precision": precision,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def turns(command: list[str], name: str, environment: dict[str, str] | None = None) -> Turn:
    """Start a process that takes turns at the orders of its standard input, as benchmarks/peer_turns.py does."""
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def turn(steps: int) -> tuple[list[float], float]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{name} ended with code {process.wait()}")
        said = json.loads(answer)
        return said["seconds"], said["loss"]

    return turn
