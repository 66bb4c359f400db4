"""Values of options: converted to the type of their field, and small records of them as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import partial
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def convert(key: str, kind: Any, value: Any, *, text: bool = False) -> Any:
    """Return a value as one of a field's type, so that it can be written to a file.

    Numbers may be numpy's, whole numbers may be floats such as ``1e6``, lists become tuples, and a
    ``torch.device`` becomes a string. Types are numbers, bool, str, Literals, tuples of any length,
    and one of these or None; values of others are returned as they are. With ``text``, numbers may
    be strings: PyYAML reads ``1e-3``, which has no point, as one.

    Example:
        >>> convert("steps", int, np.float64(1e3)), convert("rate", float, "1e-3", text=True)
        (1000, 0.001)

    """
    try:
        return _converted(kind, value, text)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} must be {_words(kind)}, got {value!r}") from None


def _converted(kind: Any, value: Any, text: bool) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value in inner:
            return value
        raise ValueError
    if origin in (Union, UnionType):
        if value is None or (text and value == "None"):
            return None
        return _converted(inner[0], value, text)
    if origin is tuple:
        if not isinstance(value, list | tuple | np.ndarray):
            raise TypeError
        return tuple(_converted(inner[0], item, text) for item in value)
    if kind in (int, float):
        if isinstance(value, bool | np.bool_) or not (isinstance(value, Real) or text):
            raise TypeError
        return float(value) if kind is float else _whole(value)
    if kind is bool:
        if text and value in ("True", "False"):
            return value == "True"
        if not isinstance(value, bool | np.bool_):
            raise TypeError
        return bool(value)
    if kind is str:
        if not isinstance(value, str | torch.device):
            raise TypeError
        return str(value)
    return value


def _whole(value: Any) -> int:
    """Return a whole number; a string of digits, however many, is read exactly."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)
    if value != int(value):
        raise ValueError
    return int(value)


def _words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return f"{_words(inner[0])} or None"
    if origin is tuple:
        return f"a list, each item {_words(inner[0])}"
    return _WORDS[kind]


def record_from_text(key: str, text: str, kinds: Mapping[str, type[Any]], **defaults: Any) -> Any:
    """Return the record that a text such as ``"lbfgs"`` or ``"adam:lr=0.01,epochs=8"`` names.

    ``kinds`` are dataclasses by name; ``defaults`` are values of fields that the text leaves out.
    """
    name, _, rest = text.partition(":")
    if name not in kinds:
        raise ValueError(f"{key} must be one of {', '.join(kinds)}, got {text!r}")
    kind = kinds[name]
    hints = get_type_hints(kind)
    known = [field.name for field in fields(kind)]
    values = {k: v for k, v in defaults.items() if k in known}
    for item in filter(None, rest.split(",")):
        field, equals, value = (part.strip() for part in item.partition("="))
        if field not in known or not equals:
            near = get_close_matches(field, known, n=1)
            hint = f"did you mean {near[0]}=?" if near else f"it has {', '.join(known) or 'none'}"
            raise ValueError(f"{key}={name} has no field {item.strip()!r}: {hint}")
        values[field] = convert(f"{field} of {key}={name}", hints[field], value, text=True)
    return kind(**values)


def record_to_text(record: Any, kinds: Mapping[str, type[Any]]) -> str | None:
    """Return the text of a record of one of some types, or None if it is of none of them.

    Example:
        >>> from rl import LBFGSFit
        >>> record_to_text(LBFGSFit(steps=5), {"lbfgs": LBFGSFit})
        'lbfgs:steps=5'

    """
    for name, kind in kinds.items():
        if type(record) is kind and is_dataclass(record):
            values = ",".join(f"{f.name}={getattr(record, f.name)!r}" for f in fields(record))
            return f"{name}:{values}" if values else name
    return None


def _check(
    holds: Callable[[Any], bool], words: str, options: Any = None, /, *names: str, **values: Any
) -> None:
    """Raise a ValueError where a field of a record, or a value, is neither None nor as it must."""
    for name, value in ({n: getattr(options, n) for n in names} | values).items():
        if value is not None and not holds(value):
            raise ValueError(f"{name} must {words}, got {value}")


check_counts = partial(_check, lambda x: x >= 1, "be at least 1")
check_fractions = partial(_check, lambda x: 0 <= x <= 1, "lie in [0, 1]")
check_positive = partial(_check, lambda x: 0 < x < math.inf, "be a positive, finite number")
check_not_negative = partial(_check, lambda x: 0 <= x < math.inf, "be finite and not negative")


def convert_fields(record: Any) -> None:
    """Give the fields of a frozen dataclass values of their types."""
    hints = get_type_hints(type(record))
    for field in fields(record):
        value = convert(field.name, hints[field.name], getattr(record, field.name))
        object.__setattr__(record, field.name, value)
