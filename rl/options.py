"""Values of options: converted to the type of their field, and small records of them as text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def convert(key: str, kind: Any, value: Any, *, text: bool = False) -> Any:
    """Return a value as one of a field's type, so that it can be written to a file.

    Numbers may be numpy's, whole numbers may be floats such as ``1e6``, lists become tuples, and a
    ``torch.device`` becomes a string.

    Args:
        key: what to call the value in an error.
        kind: the field's type: a number, bool, str, a Literal, a tuple of any length, or one of
            these or None. Values of other types are returned as they are.
        value: the value.
        text: accept numbers as strings: PyYAML reads ``1e-3``, which has no point, as one.

    Raises:
        ValueError: the value is not of that type.

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

    Args:
        key: the option, for errors.
        text: a name, and perhaps fields.
        kinds: dataclasses by name.
        defaults: values of fields that the text leaves out, where a record has them.

    Raises:
        ValueError: an unknown name or field, or a value of the wrong type.

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


def check_counts(options: Any, *names: str) -> None:
    """Raise a ValueError where one of the fields of a record is less than 1."""
    for name in names:
        value = getattr(options, name)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_not_negative(options: Any, *names: str) -> None:
    """Raise a ValueError where one of the fields is neither None nor finite and at least 0."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_positive(options: Any, *names: str) -> None:
    """Raise a ValueError where one of the fields is neither None nor positive and finite."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive, finite number, got {value}")


def check_fractions(options: Any, *names: str) -> None:
    """Raise a ValueError where one of the fields is neither None nor in [0, 1]."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def convert_fields(record: Any) -> None:
    """Give the fields of a frozen dataclass values of their types."""
    hints = get_type_hints(type(record))
    for field in fields(record):
        value = convert(field.name, hints[field.name], getattr(record, field.name))
        object.__setattr__(record, field.name, value)
