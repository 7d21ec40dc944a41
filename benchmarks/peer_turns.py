"""What the peers' programs have in common: their job, and the turns they take; needs nothing but torch.

argv[1] is the job, JSON. Each line of standard input is a number of steps to take; the answer is one line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import torch
from torch import Tensor


def the_job() -> tuple[dict[str, Any], torch.device, torch.dtype]:
    """The job, with torch set up for it, its device, and the type of weights."""
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    return job, torch.device(job["device"]), {"bf16": torch.bfloat16, "fp32": torch.float32}[job["precision"]]


def orders() -> Iterator[int]:
    """Numbers of steps from standard input, until it ends."""
    return (int(line) for line in sys.stdin)


def take_turns(
    job: dict[str, Any],
    device: torch.device,
    step: Callable[[Tensor, Tensor], Tensor],
    counts: Iterable[int] | None = None,
    out: IO[str] = sys.stdout,
) -> None:
    """A turn of so many steps for each of `counts`, by default those of `orders`, answered in `out`.

    step: of ids and labels [rows, length], gives the mean loss."""
    generator = torch.Generator().manual_seed(0)
    for count in orders() if counts is None else counts:
        seconds, loss = [], torch.zeros(())
        for _ in range(count):
            rows = torch.randint(0, job["vocab"], (job["rows"], job["length"] + 1), generator=generator).to(device)
            ids, labels = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
            begin = time.perf_counter()
            loss = step(ids, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        print(json.dumps({"seconds": seconds, "loss": float(loss.detach())}), file=out, flush=True)
