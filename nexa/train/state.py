"""How far a run has come: all that a resume needs besides weights and moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class RunState:
    """step: updates made under the current schedule. samples: sequences consumed in the current data order.
    tokens: target tokens over all ranks, in the run's whole life. skipped: fp16 updates dropped."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped: int = 0

    def to_dict(self) -> dict[str, int]:
        """For `state.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunState:
        """From `state.json`; keys of other parts are left alone."""
        return cls(**{f.name: int(values[f.name]) for f in fields(cls)})
