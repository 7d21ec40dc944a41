"""What a loss-curve law is: linear in some parameters, given the others; and the table of laws."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from nexa.errors import UserError
from nexa.scaling.laws.rates import Floats, Rates

Range = tuple[float, float]


class Law(ABC):
    """loss = basis(shape) @ linear, at chosen steps of a schedule.

    Every law here is a sum of terms, each with a coefficient (`linear`), whose form depends on a few more
    parameters (`shape`). That makes starting points cheap: for any shape the best coefficients are least squares.
    """

    name: ClassVar[str]
    linear: ClassVar[tuple[str, ...]]
    shape: ClassVar[tuple[str, ...]]
    order: ClassVar[tuple[str, ...]]
    """All names as they are printed and written."""
    bounds: ClassVar[Mapping[str, Range]]
    """Of the shape parameters."""
    grid: ClassVar[Mapping[str, Sequence[float]]]
    """Of starting points, over the shape parameters."""
    starts: ClassVar[int] = 6
    """How many of the grid's points, the best ones, L-BFGS-B starts from."""
    coarse: ClassVar[int] = 1
    """The starts use every so-manieth row only; the fit is then finished on all."""
    anchor: ClassVar[Mapping[str, float]] = {}
    """Values that shape parameters keep unless the curves speak against them; see `prior`."""
    prior: ClassVar[float] = 0.0
    """How strongly, unless a fit says so: this times log(parameter / anchor) is a residual like those of rows."""
    signed: ClassVar[tuple[str, ...]] = ()
    """Coefficients that may be negative; the others are at least 0."""
    continual: ClassVar[bool] = False
    """Whether it counts what a continual run goes on from."""
    needs_size: ClassVar[bool] = False
    """Whether every curve must say how many parameters the model has."""
    options: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Conventions that can be chosen, with their values; the first is the default."""

    def __init__(self, fixed: Mapping[str, float] | None = None, **options: Any) -> None:
        """`fixed`: parameters that are not fitted; `options`: see `options`. Raises UserError for a wrong one."""
        self.fixed = dict(fixed or {})
        for key, value in options.items():
            if value not in self.options.get(key, ()):
                known = ", ".join(f"{name} ({', '.join(map(str, of))})" for name, of in self.options.items()) or "none"
                raise UserError(f"law {self.name}: option {key}={value!r}; options are {known}")
        self.chosen = {key: options.get(key, values[0]) for key, values in self.options.items()}

    @abstractmethod
    def features(self, rates: Rates, index: np.ndarray, size: float | None) -> Any:
        """What the law needs to know of a schedule at the updates `index` [n]; `size` in parameters of the model."""

    @abstractmethod
    def basis(self, features: Any, shape: Floats) -> tuple[Floats, Floats]:
        """The terms [n, linear] and their derivatives with respect to the shape parameters [n, linear, shape]."""

    @abstractmethod
    def final(self, rates: Rates, params: Mapping[str, float], size: float | None = None) -> tuple[float, Floats]:
        """Loss after the last update and its derivative with respect to the rate of each update [total]."""

    @property
    def fitted(self) -> tuple[str, ...]:
        """Names of the parameters that a fit finds, the linear ones first."""
        return self.linear + self.shape

    def with_fixed(self, **fixed: float) -> Law:
        """The same law with other fixed parameters."""
        return type(self)({**self.fixed, **fixed}, **self.chosen)

    def vector(self, params: Mapping[str, float]) -> Floats:
        """The fitted parameters in the order of `fitted`."""
        return np.array([params[name] for name in self.fitted], dtype=np.float64)

    def mapping(self, theta: Floats) -> dict[str, float]:
        """All parameters by name, the fixed ones too, in `order`."""
        known = self.fixed | dict(zip(self.fitted, map(float, theta), strict=True))
        return {name: known[name] for name in self.order}

    def evaluate(self, features: Any, theta: Floats) -> Floats:
        """The loss [n]."""
        count = len(self.linear)
        return self.basis(features, theta[count:])[0] @ theta[:count]

    def evaluate_with_slopes(self, features: Any, theta: Floats) -> tuple[Floats, Floats]:
        """The loss [n] and its derivatives with respect to `fitted` [n, parameters]."""
        count = len(self.linear)
        terms, slopes = self.basis(features, theta[count:])
        return terms @ theta[:count], np.hstack([terms, np.einsum("nls,l->ns", slopes, theta[:count])])

    def predict(
        self, rates: Rates, index: np.ndarray, params: Mapping[str, float], size: float | None = None
    ) -> Floats:
        """The loss at the updates `index` [n]; not finite where the law has none (rate 0 so far)."""
        return self.evaluate(self.features(rates, index, size), self.vector(params))


def area(rates: Rates) -> Floats:
    """S1 [total + 1]: sum of the rates up to and with each update, warm-up included."""
    return np.cumsum(rates.values)


def drops(rates: Rates, *, counted: bool) -> Floats:
    """By how much the rate fell to each update [total + 1], negative where it rose.

    `counted`: warm-up's rises too; otherwise only what happens after step `warmup`.
    """
    falls = -np.diff(rates.values, prepend=rates.values[0])
    if not counted:
        falls[: rates.warmup + 1] = 0.0
    return falls


def power(base: Floats, exponent: float) -> tuple[Floats, Floats]:
    """base^-exponent and its derivative with respect to the exponent; infinite, without a warning, where base is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(base)
        value = np.exp(-exponent * logs)
        return value, -value * logs
