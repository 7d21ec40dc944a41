"""What normalisation does inside the network: quantities measured layer by layer, and a report that compares models."""

from __future__ import annotations

from nexa.diagnostics.base import Sharing
from nexa.diagnostics.measure import DURING_TRAINING, MEASURES, Diagnosis, measure

__all__ = ["DURING_TRAINING", "MEASURES", "Diagnosis", "Sharing", "measure"]
