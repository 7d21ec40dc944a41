"""Speed of one training step: nexa against transformers' LLaMA under torch.compile and other trainers' models.

    python -m benchmarks.step [--shape 34m] [--precision bf16] [--device cpu] [--only nexa ...] [--out step.json]

Every contestant has the same architecture and initial weights, gradient clipping at norm 1, and torch's fused AdamW,
in bf16 with fp32 master weights and moments: the model alone differs. `engine` is the path of train.py
(nexa.parallel.engine). Contestants in this process share what nexa asks of the allocator; `transformers alone` is the
same model in a process without it. litgpt and torchtitan are installed into environments of their own. Contestants
take turns; the median counts. The share of the peak is 6 FLOPs per matrix weight and token (plus attention) over the
FLOP/s of a large matmul in the same dtype, measured between the turns: the median step by the median matmul, and the
fastest by the fastest. The share of the products is what all matrix products of a step take, forward and backward in
the shapes of this model and one after another with nothing in between, over the step; MFU is by the data sheet of the
GPU. `loss` is that of the last step: all must agree to the dtype's digits. On a GPU, memory
is the peak of what a contestant's tensors take, for the engine beside what `nexa plan` says.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.master_adamw import BETAS, CLIP, EPS, LR, MasterAdamW, training_step
from benchmarks.peers import Turn, peer, the_job, turns
from benchmarks.shapes import SHAPES, Shape, default_shape
from nexa.cli.plan import layout_of
from nexa.config.schema import Config, DataConfig, OptimConfig, ParallelConfig, TrainConfig
from nexa.hardware import keep_freed_memory, peak_flops
from nexa.interop.huggingface import config_json
from nexa.model.decoder import Decoder
from nexa.model.init import initialise
from nexa.scaling.memory import memory
from nexa.scaling.trace import Tracer

GEMM_SIZE = {"cpu": 3072, "cuda": 8192}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
GIB = 2**30
Step = Callable[[Tensor, Tensor], Tensor]
"""Of ids and labels [rows, length]; the mean loss."""


@dataclass(frozen=True)
class Setting:
    """What all contestants have in common."""

    shape: Shape
    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return DTYPES[self.precision]

    def decoder(self) -> Decoder:
        """The decoder with the initial weights of every contestant, fp32, on the CPU."""
        config = Config(model=self.shape.model)
        decoder = Decoder(self.shape.model, config.norm)
        initialise(decoder, self.shape.model, config.norm, seed=0)
        return decoder

    def config(self, parallel: ParallelConfig, micro_batch: int) -> Config:
        """Of a run of train.py."""
        return Config(
            model=self.shape.model,
            data=DataConfig(sequence_length=self.shape.length),
            train=TrainConfig(
                steps=10**6,
                global_batch_size=self.shape.batch,
                micro_batch_size=micro_batch,
                precision=self.precision,  # type: ignore[arg-type]
                grad_clip=CLIP,
                compile=True,
                device=self.device.type,  # type: ignore[arg-type]
            ),
            optim=OptimConfig(lr=LR, betas=list(BETAS), eps=EPS, weight_decay=0.0),
            parallel=parallel,
        )


def bare_loop(model: Decoder, setting: Setting) -> Step:
    """A decoder with compiled blocks and loss in a bare loop."""
    model = model.to(setting.device, setting.dtype)
    model.compile_parts()
    optimizer = MasterAdamW(list(model.parameters()))
    return training_step(lambda ids, labels: model(ids, labels) / labels.numel(), optimizer)


def nexa_loop(setting: Setting) -> Step:
    """nexa's decoder without its engine."""
    return bare_loop(setting.decoder(), setting)


def nexa_engine(setting: Setting) -> Step:
    """What train.py runs on one rank."""
    from nexa.parallel.engine import Engine
    from nexa.parallel.topology import connect

    cfg = setting.config(ParallelConfig(zero_stage=1), setting.shape.batch)
    engine = Engine(cfg, connect(cfg))

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        rows = engine.forward_backward({"input_ids": ids, "labels": labels}, float(labels.numel()))
        engine.step(LR)
        return rows.sum() / labels.numel()

    return step


def transformers_llama(setting: Setting) -> Step:
    """transformers' LlamaForCausalLM, compiled as a whole, SDPA attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    options = config_json(setting.shape.model, Config().norm, eos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="sdpa", use_cache=False))
    model.load_state_dict(setting.decoder().state_dict())
    model = model.to(setting.device, setting.dtype).train()
    compiled = torch.compile(model)
    optimizer = MasterAdamW(list(model.parameters()))
    # shift_labels: the labels stand already one to the left, as nexa's do
    return training_step(
        lambda ids, labels: compiled(input_ids=ids, labels=labels, shift_labels=labels).loss, optimizer
    )


HERE: dict[str, Callable[[Setting], Step]] = {
    "nexa": nexa_loop,
    "nexa engine": nexa_engine,
    "transformers": transformers_llama,
}
PEERS = ("litgpt", "torchtitan")
"""Installed into environments of their own, where they run."""
ALONE = "transformers alone"
"""The same model as `transformers`, in a process of its own."""


def contestant(name: str, setting: Setting) -> Turn:
    """What takes steps under this name."""
    if name in PEERS:
        return peer(name, setting.device, setting.shape, setting.precision, setting.decoder().state_dict())
    if name == ALONE:
        job = json.dumps(the_job(setting.device, setting.shape, setting.precision))
        shape = next(key for key, value in SHAPES.items() if value == setting.shape)
        return turns([sys.executable, "-m", "benchmarks.own_process", shape, job], name)
    step, draw = HERE[name](setting), batches(setting.shape, setting.device)

    def turn(steps: int) -> tuple[list[float], float]:
        seconds, box = [], [torch.zeros(())]
        for _ in range(steps):
            ids, labels = draw()

            def one(ids: Tensor = ids, labels: Tensor = labels) -> None:
                box[0] = step(ids, labels)

            seconds.append(seconds_of(one, setting.device))
        return seconds, float(box[0])

    return turn


def seconds_of(action: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def gemm(setting: Setting) -> Callable[[], float]:
    """A function that measures the FLOP/s of one large matmul."""
    size = GEMM_SIZE[setting.device.type]
    left, right = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))
    return lambda: 2 * size**3 / seconds_of(lambda: left @ right, setting.device)


def products(setting: Setting) -> Callable[[], float]:
    """A function that measures the seconds of all matrix products that a step's linear layers make."""
    with torch.device("meta"):
        decoder = Decoder(setting.shape.model, Config().norm)
    shapes = [tuple(module.weight.shape) for module in decoder.modules() if isinstance(module, nn.Linear)]
    rows = setting.shape.tokens
    made: dict[tuple[int, ...], list[Tensor]] = {}
    for out, into in set(shapes):
        sides = ((rows, into), (out, into), (rows, out))
        drawn = [torch.randn(side, device=setting.device).to(setting.dtype) for side in sides]
        made[out, into] = [*drawn, *(torch.empty_like(each) for each in drawn)]

    def multiply() -> None:
        for shape in shapes:
            x, weight, gradient, by_x, by_weight, y = made[shape]
            torch.mm(x, weight.t(), out=y)
            torch.mm(gradient, weight, out=by_x)
            torch.mm(gradient.t(), x, out=by_weight)

    return lambda: seconds_of(multiply, setting.device)


def batches(shape: Shape, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """A function that gives (input ids, labels); each call of it another batch, from the same sequence."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        size = (shape.batch, shape.length + 1)
        rows = torch.randint(0, shape.model.vocab_size, size, generator=generator).to(device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return draw


def measure(names: list[str], setting: Setting, warmup: int, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds per step of each contestant, taking turns of `steps` steps, and the GEMM peak in between."""
    turns, losses, taken_memory = {}, {}, {}
    for name in names:
        before = _forget_peak(setting.device)
        turns[name] = contestant(name, setting)
        losses[name] = turns[name](warmup)[1]
        if setting.device.type == "cuda" and name in HERE:
            taken_memory[name] = torch.cuda.max_memory_allocated() - before
    seconds: dict[str, list[float]] = {name: [] for name in names}
    flops, matmul, alone, multiply = [], gemm(setting), [], products(setting)
    matmul(), multiply()
    for _ in range(rounds):
        for name, take in turns.items():
            taken, losses[name] = take(steps)
            seconds[name] += taken
        flops += [matmul() for _ in range(3)]
        alone += [multiply() for _ in range(2)]
    return {
        "seconds": seconds,
        "losses": losses,
        "memory": taken_memory,
        "gemm_flops": statistics.median(flops),
        "best_gemm_flops": max(flops),
        "products": statistics.median(alone),
    }


def _forget_peak(device: torch.device) -> int:
    """Bytes allocated on a GPU now, from where its peak counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def planned(setting: Setting) -> float:
    """Bytes that `nexa plan` predicts for the engine."""
    cfg = setting.config(ParallelConfig(zero_stage=1), setting.shape.batch)
    return memory(layout_of(cfg, 1), Tracer(cfg.model, cfg.norm)).peak.total


def summary(found: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """Medians, tokens per second and shares of the peak."""
    peak, _ = peak_flops(setting.device, setting.precision)
    rows = {}
    for name, times in found["seconds"].items():
        median = statistics.median(times)
        rows[name] = {
            "step_seconds": median,
            "fastest_step_seconds": min(times),
            "tokens_per_second": setting.shape.tokens / median,
            "share_of_gemm_peak": setting.shape.flops / median / found["gemm_flops"],
            "share_of_best_gemm": setting.shape.flops / min(times) / found["best_gemm_flops"],
            "share_of_products": found["products"] / median,
            "mfu": setting.shape.flops / median / peak if peak else None,
            "memory_gib": found["memory"][name] / GIB if name in found["memory"] else None,
            "loss": found["losses"][name],
        }
    cuda = setting.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": setting.precision,
        "parameters": sum(p.numel() for p in setting.decoder().parameters()),
        "batch": [setting.shape.batch, setting.shape.length],
        "gemm_flops": found["gemm_flops"],
        "best_gemm_flops": found["best_gemm_flops"],
        "products_seconds": found["products"],
        "planned_gib": planned(setting) / GIB if cuda else None,
        "results": rows,
    }


def report(result: dict[str, Any]) -> str:
    """The table."""
    rows, length = result["batch"]
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['torch']}, {result['precision']}",
        f"{result['parameters']:,} parameters, batch {rows} x {length}",
        f"GEMM peak {result['gemm_flops'] / 1e12:.3f} TFLOP/s, at best {result['best_gemm_flops'] / 1e12:.3f}",
        f"the model's own products alone: {result['products_seconds'] * 1e3:.1f} ms",
        f"{'':18}{'ms/step':>9}{'of peak':>9}{'fastest':>9}{'of peak':>9}{'tokens/s':>10}{'products':>10}"
        f"{'MFU':>7}{'GiB':>7}{'loss':>9}",
    ]
    for name, row in result["results"].items():
        mfu, gib = row["mfu"], row["memory_gib"]
        lines.append(
            f"{name:18}{row['step_seconds'] * 1e3:9.1f}{row['share_of_gemm_peak']:9.1%}"
            f"{row['fastest_step_seconds'] * 1e3:9.1f}{row['share_of_best_gemm']:9.1%}"
            f"{row['tokens_per_second']:10,.0f}{row['share_of_products']:10.1%}"
            f"{'n/a' if mfu is None else f'{mfu:.1%}':>7}{'n/a' if gib is None else f'{gib:.1f}':>7}{row['loss']:9.4f}"
        )
    if result["planned_gib"] is not None:
        lines.append(f"nexa plan says {result['planned_gib']:.1f} GiB for nexa engine")
    return "\n".join(lines)


def main() -> None:
    """Measure, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", choices=SHAPES, help="default: 34m on a CPU, 1b on a GPU")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--only", nargs="+", choices=(*HERE, ALONE, *PEERS), default=list(HERE))
    parser.add_argument("--warmup", type=int, default=3, help="steps before the first measured one, compilation too")
    parser.add_argument("--rounds", type=int, default=6, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape or default_shape(arguments.device)]
    setting = Setting(shape, arguments.precision, torch.device(arguments.device))
    if setting.device.type == "cpu":
        keep_freed_memory()  # for all contestants: they share the process
    found = measure(arguments.only, setting, arguments.warmup, arguments.rounds, arguments.steps)
    result = summary(found, setting)
    print(report(result))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
