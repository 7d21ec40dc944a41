"""Loss-curve laws: what loss a learning-rate schedule leads to. Knows neither the loop nor the engine."""

from nexa.scaling.laws.annealing import Annealing, SizedAnnealing
from nexa.scaling.laws.base import Law as Law
from nexa.scaling.laws.continual import Continual, ContinualReplay, ContinualSize
from nexa.scaling.laws.momentum import ForwardMomentum
from nexa.scaling.laws.multipower import MultiPower

LAWS: dict[str, type[Law]] = {
    law.name: law
    for law in (Annealing, MultiPower, SizedAnnealing, ForwardMomentum, Continual, ContinualReplay, ContinualSize)
}
"""Name -> law; a new law is a class and a place here."""
