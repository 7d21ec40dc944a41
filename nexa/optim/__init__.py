"""Update rules and learning-rate schedules; knows neither the loop nor the engine."""

from nexa.optim.build import build as build
from nexa.optim.schedules import Turn as Turn
from nexa.optim.schedules import learning_rate as learning_rate
from nexa.optim.schedules import learning_rate_with_turns as learning_rate_with_turns
