"""What a lossless conversion gains: a LayerNorm model against its equals with RMSNorm and CRMSNorm.

    python benchmarks/convert.py [--out convert.json]

One fp32 Pre-LN model with random gains and biases is converted in memory by the code of `nexa convert`, so that all
contestants compute the same logits; `error` is the largest difference from the LayerNorm model's, relative to its
largest logit. They take turns in one process; medians count, on CPUs of CPU time. A step is forward, backward and fused
AdamW; forward is without gradients. `rmsnorm without biases` is the same shape trained as RMSNorm from the start.
CRMSNorm has one feature less than `--hidden`, and matrix products like multiples of 8 or 16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from nexa.config.schema import ModelConfig, NormConfig
from nexa.hardware import keep_freed_memory
from nexa.interop.convert import Converted, Target, converted
from nexa.interop.weights import parameter_shapes
from nexa.model.decoder import Decoder
from nexa.model.init import initialise

MODEL = ModelConfig(vocab_size=4096, intermediate_size=1376, num_hidden_layers=8, head_dim=64)
NORM = NormConfig(kind="layernorm")
Action = Callable[[], object]


class State:
    """A decoder's tensors, as a conversion reads them."""

    def __init__(self, decoder: Decoder) -> None:
        self._state = decoder.state_dict()

    def rows(self, name: str) -> Iterator[Tensor]:
        """A matrix at once; a vector as one row."""
        tensor = self._state[name].double()
        yield tensor[None] if tensor.dim() == 1 else tensor


def source(model: ModelConfig) -> Decoder:
    """The LayerNorm model, away from its initial gains and biases."""
    decoder = Decoder(model, NORM)
    initialise(decoder, model, NORM, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return decoder


def equal(decoder: Decoder, target: Target) -> Decoder:
    """Its equal with `target` norms."""
    model, norm = converted(decoder.config, NORM, target)
    tensors = Converted(State(decoder), decoder.config, NORM, target)
    found = Decoder(model, norm)
    shapes = parameter_shapes(model, norm)
    found.load_state_dict({name: torch.cat(list(tensors.rows(name))).reshape(shapes[name]) for name in shapes})
    return found


def plain(model: ModelConfig) -> Decoder:
    """RMSNorm from the start."""
    norm = dataclasses.replace(NORM, kind="rmsnorm")
    decoder = Decoder(model, norm)
    initialise(decoder, model, norm, seed=0)
    return decoder


def actions(decoder: Decoder, ids: Tensor, labels: Tensor, compiled: bool) -> dict[str, Action]:
    """What is timed of one contestant."""
    if compiled:
        decoder.compile_parts()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-5, fused=True)

    def forward() -> None:
        with torch.no_grad():
            decoder(ids)

    def step() -> None:
        (decoder(ids, labels) / labels.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"forward": forward, "step": step}


def seconds_of(action: Action, device: torch.device) -> float:
    """Seconds of one call: of the clock, with a GPU's work done, or of CPU time, for CPUs that are shared."""
    if device.type == "cpu":
        begin = time.process_time()
        action()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each contestant, after two of warming up")
    parser.add_argument("--hidden", type=int, default=512, help="width of the LayerNorm model")
    parser.add_argument("--batch", type=int, default=4, help="sequences of 256 tokens")
    parser.add_argument("--compile", action="store_true", help="torch.compile blocks and loss, as train.compile does")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    rows = torch.randint(0, MODEL.vocab_size, (arguments.batch, 257), generator=torch.Generator().manual_seed(1))
    ids, labels = rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)
    model = dataclasses.replace(MODEL, hidden_size=arguments.hidden)
    first = source(model)
    decoders = {"layernorm": first, "rmsnorm": equal(first, "rmsnorm"), "crmsnorm": equal(first, "crmsnorm")}
    decoders["rmsnorm without biases"] = plain(model)
    decoders = {name: decoder.to(device) for name, decoder in decoders.items()}
    with torch.no_grad():
        logits = {name: decoder(ids[:1]) for name, decoder in decoders.items()}
    wanted = logits["layernorm"]
    timed = {name: actions(decoder, ids, labels, arguments.compile) for name, decoder in decoders.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {"forward": [], "step": []} for name in timed}
    for turn in range(arguments.rounds + 2):
        for name, parts in timed.items():
            for part, action in parts.items():
                taken = seconds_of(action, device)
                if turn >= 2:
                    seconds[name][part].append(taken)
    found = {
        name: {part: statistics.median(times) for part, times in parts.items()}
        | {"error": float((logits[name] - wanted).abs().max() / wanted.abs().max())}
        for name, parts in seconds.items()
    }
    base = found["layernorm"]
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads, batch {arguments.batch} x 256")
    print(f"{'':24}{'forward ms':>11}{'':>8}{'step ms':>9}{'':>8}{'error':>10}")
    for name, row in found.items():
        print(
            f"{name:24}{row['forward'] * 1e3:11.1f}{row['forward'] / base['forward']:8.1%}"
            f"{row['step'] * 1e3:9.1f}{row['step'] / base['step']:8.1%}{row['error']:10.1e}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
