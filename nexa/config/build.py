"""Plain containers -> typed `Config`, with every problem found and none raised early."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from nexa.config.fields import default_of, groups, hints, keys, nearest, shorten, type_name, unknown_key
from nexa.config.schema import Config
from nexa.errors import ConfigError

MISSING = "???"
"""What OmegaConf calls a value that must be given."""


_LARGEST = 1e30
"""Beyond every number of a run; keeps Python's unbounded integers out of floats and counters."""


class _Wrong(Exception):
    """A value that does not fit its type; the message says what would."""


@dataclasses.dataclass
class Built:
    """A configuration and what is wrong with it; a bad value is replaced by its default."""

    config: Config
    problems: list[str]
    bad: set[str]
    """Dotted names of the replaced leaves, so that no check judges a replacement."""


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Build a `Config` from nested mappings, lists and scalars; what is absent takes its default.

    Raises:
        ConfigError: all unknown keys (with the nearest known ones), wrong types, bad choices and values that
            must be given (`???`), together. Rules between keys are `check`'s.
    """
    built = build(mapping)
    if built.problems:
        raise ConfigError(built.problems)
    return built.config


def build(mapping: Mapping[str, Any]) -> Built:
    """`from_mapping` that returns its problems."""
    built = Built(Config(), [], set())
    if not isinstance(mapping, Mapping):
        built.problems.append(f"the configuration is {shorten(mapping)}, which is no mapping of keys to values")
        return built
    built.config = _build(Config, mapping, "", built)
    return built


def _build(cls: type, mapping: Mapping[str, Any], prefix: str, built: Built) -> Any:
    """One dataclass from its mapping; problems go to `built`."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in mapping:
        if name not in known:
            built.problems.append(_unknown(cls, f"{prefix}{name}", mapping[name]))
    values = {name: _field(cls, field, mapping, prefix, built) for name, field in known.items()}
    return cls(**values)


def _unknown(cls: type, name: str, value: Any) -> str:
    """Problem of a key that `cls` does not have: the whole schema gives the hint, or the fields of a list item."""
    if cls is Config or cls in groups().values():
        return unknown_key(name, ... if isinstance(value, Mapping) else value)
    return f"{name}={shorten(value)}: there is no such key; there are {', '.join(hints(cls))}"


def _field(cls: type, field: dataclasses.Field[Any], mapping: Mapping[str, Any], prefix: str, built: Built) -> Any:
    """The value of one field, its default when it is absent or wrong."""
    name, hint = f"{prefix}{field.name}", hints(cls)[field.name]
    if field.name not in mapping:
        return default_of(field)
    value = mapping[field.name]
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return _build(typing.cast(type, hint), value, f"{name}.", built)
        inside = ", ".join(hints(typing.cast(type, hint)))
        built.problems.append(f"{name}={shorten(value)}: must be a group of keys ({inside})")
        built.bad.update(key for key in keys() if key.startswith(f"{name}."))
        return default_of(field)
    before = len(built.problems)
    try:
        result = _coerce(value, hint, name, built)
    except _Wrong as wrong:
        built.problems.append(f"{name}={shorten(value)}: {wrong}")
    if len(built.problems) > before:
        built.bad.add(name)
        return default_of(field)
    return result


def _coerce(value: Any, hint: Any, name: str, built: Built) -> Any:
    """`value` as type `hint`.

    Raises:
        _Wrong: the value as a whole does not fit. Problems inside a list go to `built`.
    """
    if isinstance(value, str) and value == MISSING:
        documentation = keys()[name].doc if name in keys() else type_name(hint)
        raise _Wrong(f"must be given: {documentation}")
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return _choice(value, typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return _coerce(value, _branch(value, typing.get_args(hint), hint), name, built)
    if origin is list:
        return _items(value, typing.get_args(hint)[0], name, built)
    return _scalar(value, hint)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    """One of the choices of a Literal; YAML reads a bare `off` as false and `on` as true."""
    if isinstance(value, bool):
        value = "on" if value else "off"
    if isinstance(value, str) and value in choices:
        return value
    close = nearest(str(value), [str(choice) for choice in choices], 1)
    hint = f"did you mean {close[0]}? " if close else ""
    raise _Wrong(f"{hint}must be one of {', '.join(map(str, choices))}")


def _branch(value: Any, arguments: tuple[Any, ...], hint: Any) -> Any:
    """The member of a union that the shape of `value` (null, list, scalar) selects."""
    if value is None and type(None) in arguments:
        return type(None)
    is_list = isinstance(value, (list, tuple))
    for argument in arguments:
        if argument is not type(None) and (typing.get_origin(argument) is list) == is_list:
            return argument
    example = f", for example [{value}]" if isinstance(value, (str, int, float)) else ""
    raise _Wrong(f"must be {type_name(hint)}{example}")


def _items(value: Any, item: Any, name: str, built: Built) -> list[Any]:
    """A list, item by item."""
    if not isinstance(value, (list, tuple)):
        example = f", for example [{value}]" if isinstance(value, (str, int, float)) else ""
        raise _Wrong(f"must be a {type_name(list[item])}{example}")
    result = []
    for index, entry in enumerate(value):
        place = f"{name}[{index}]"
        if dataclasses.is_dataclass(item) and isinstance(entry, Mapping):
            result.append(_build(typing.cast(type, item), entry, f"{place}.", built))
            continue
        try:
            if dataclasses.is_dataclass(item):
                raise _Wrong(f"must be a mapping {{{', '.join(hints(typing.cast(type, item)))}}}")
            result.append(_coerce(entry, item, place, built))
        except _Wrong as wrong:
            built.problems.append(f"{place}={shorten(entry)}: {wrong}")
    return result


def _scalar(value: Any, hint: type) -> Any:
    """A bool, int, float, str or None. An integral float such as 1e9 is an integer, a bool is not."""
    if hint is type(None) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and (isinstance(value, str) or type(value) is int):
        return str(value)
    if hint in (int, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):
            raise _Wrong("must be a finite number")
        if abs(value) > _LARGEST:
            raise _Wrong(f"must be a number up to {_LARGEST:.0e}")
        if hint is float:
            return float(value)
        if value == int(value):
            return int(value)
    raise _Wrong(_EXPECTED[hint] + _quoting(value, hint))


def _quoting(value: Any, hint: type) -> str:
    """Advice where YAML or Hydra read something other than the user meant."""
    if hint is str and isinstance(value, (bool, float)):
        return '; quote it: \'"..."\' on the command line, "..." in YAML'
    if hint in (int, float) and isinstance(value, str) and value.replace("_", "").replace(",", "").isdigit():
        return "; write the digits without separators"
    return ""


_EXPECTED: dict[type, str] = {
    bool: "must be true or false",
    int: "must be an integer",
    float: "must be a number",
    str: "must be text",
    type(None): "must be null",
}
