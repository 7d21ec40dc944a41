"""The table of measures, and one call that takes them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nexa.diagnostics.base import Measure, Seen, Sharing, Totals, Values
from nexa.diagnostics.logits import Logits
from nexa.diagnostics.observe import Observer, uncompiled
from nexa.diagnostics.passes import Gradients, LayerDrop
from nexa.diagnostics.streams import Added, Angles, Influence, Massive, Sinks, Variance
from nexa.model.decoder import Decoder

MEASURES: dict[str, type[Measure]] = {
    "variance": Variance,
    "added": Added,
    "influence": Influence,
    "angles": Angles,
    "massive": Massive,
    "sinks": Sinks,
    "attention": Logits,
    "layer_drop": LayerDrop,
    "gradient": Gradients,
}
"""Every measure by name."""
DURING_TRAINING = ("variance", "added", "influence", "massive", "sinks", "attention")
"""Those of one forward pass that keep nothing: what a run measures while it trains."""


@dataclass(frozen=True)
class Diagnosis:
    """What was measured: `values` has the quantities of all measures by name (`Measure.result` of each says which).

    A list of L + 1 numbers goes by stream (0: the embedding's output, l: what block l - 1 gives), a list of L by block.
    tokens: scored ones. loss: nats per token.
    """

    blocks: int
    tokens: int
    sequences: int
    loss: float
    values: Values

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not finite becomes null."""
        found: dict[str, Any] = finite(asdict(self))
        return found

    def rows(self) -> dict[str, float]:
        """Single numbers, and those of lists by block (`variance/embedding`, `variance/0`); NaN where there is none."""
        rows = {name: value for name, value in self.values.items() if value is None or isinstance(value, float)}
        for name, value in self.values.items():
            if isinstance(value, list) and not isinstance(value[0], list):
                labels = [*(["embedding"] if len(value) > self.blocks else []), *map(str, range(self.blocks))]
                rows |= {f"{name}/{label}": number for label, number in zip(labels, value, strict=True)}
        return {name: math.nan if number is None else number for name, number in rows.items()}


def finite(value: Any) -> Any:
    """`value` with None in the place of every number that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(
    decoder: Decoder,
    batches: Iterable[dict[str, Tensor]],
    measures: Sequence[str] = tuple(MEASURES),
    *,
    sharing: Sharing | None = None,
    forward: Callable[[dict[str, Tensor]], Tensor] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Diagnosis:
    """Measure `decoder` on batches of its `forward`'s arguments with labels, on its device.

    measures: names of `MEASURES`. sharing: how the processes of a run share each batch (None: alone); then `forward`
    must be the run's own evaluation (batch -> summed loss). progress is told the scored tokens so far. The decoder is
    run in eval mode and left as it was; how tokens are batched does not matter.

    Raises KeyError for an unknown measure, ValueError when no batch has a scored token.
    """
    sharing = Sharing() if sharing is None else sharing
    chosen = [MEASURES[name](decoder) for name in measures]
    observer = Observer(decoder, chosen, sharing)
    # tokens, sequences, summed loss
    counts = torch.zeros(3, dtype=torch.float64, device=decoder.lm_head.weight.device)
    training, done = decoder.training, 0
    decoder.eval()
    try:
        with uncompiled(decoder):
            for inputs in batches:
                seen = Seen.of(inputs)
                with observer.watching(seen), torch.no_grad():
                    loss = decoder(**inputs) if forward is None else forward(inputs)
                counts[0] += sum(seen.lengths)
                counts[1] += len(seen.lengths)
                counts[2] += loss
                for one in chosen if seen.lengths else []:
                    one.after(decoder, seen)
                done += sum(seen.lengths)
                progress(done)
        return _diagnosis(decoder, chosen, sharing.sequences(counts, "sum"), sharing)
    finally:
        for one in chosen:
            one.close()
        decoder.train(training)


def _diagnosis(decoder: Decoder, chosen: list[Measure], counts: Tensor, sharing: Sharing) -> Diagnosis:
    tokens, sequences, loss = counts.tolist()
    if tokens == 0:
        raise ValueError("no batch has a scored token")
    totals = Totals(int(tokens), int(sequences), loss / tokens)
    values: Values = {}
    for one in chosen:
        combine = sharing.heads if one.over_heads else sharing.sequences
        one.sums = {name: combine(total, "sum") for name, total in one.sums.items()}
        one.peaks = {name: combine(peak, "max") for name, peak in one.peaks.items()}
        values |= one.result(totals)
    return Diagnosis(len(decoder.model.layers), totals.tokens, totals.sequences, totals.loss, values)
