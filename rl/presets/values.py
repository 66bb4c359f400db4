"""Values read from YAML as values of a config's fields."""

from __future__ import annotations

import ast
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def convert(key: str, kind: Any, value: Any) -> Any:
    """Return a value of YAML as a value of a field.

    Numbers may be strings: PyYAML reads ``1e-3``, which has no point, as one. Whole numbers may be
    floats, as ``1.0e+6`` is, and lists become tuples.

    Args:
        key: what to call the value in an error.
        kind: the field's type: a number, bool, str, a Literal, a tuple of any length, or one of
            these or None.
        value: what YAML gave.

    Raises:
        ValueError: the value is not of that type.

    """
    try:
        return _converted(kind, value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{key} must be {_words(kind)}, got {value!r}") from None


def _converted(kind: Any, value: Any) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal and value in inner:
        return value
    if origin in (Union, UnionType):
        return None if value is None else _converted(inner[0], value)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_converted(inner[0], item) for item in value)
    if kind in (int, float) and isinstance(value, int | float | str) and type(value) is not bool:
        return float(value) if kind is float else _whole(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    raise TypeError


def _whole(value: float | str) -> int:
    """Return a whole number; a string of digits, however many, is read exactly."""
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
        return f"{_words(inner[0])} or null"
    if origin is tuple:
        return f"a list, each item {_words(inner[0])}"
    return _WORDS[kind]


def parse_literal(key: str, text: str) -> Any:
    """Return what a Python expression of literals, ``dict(...)`` and dotted names says.

    Nothing is evaluated: names, such as ``nn.Tanh``, come back as strings.

    Args:
        key: what to call the expression in an error.
        text: the expression.

    Raises:
        ValueError: it is anything else.

    """
    try:
        return _literal(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError):
        raise ValueError(
            f"{key} must be a mapping, or a string such as 'dict(a=1, b=[2, 3])', got {text!r}"
        ) from None


def _literal(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            # `None` is the key of **mapping
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            return _mapping(names, values)
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs):
            return _mapping([pair.arg for pair in pairs], [pair.value for pair in pairs])
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name() | ast.Attribute():
            return ast.unparse(node)
        case _:
            raise ValueError


def _mapping(names: list[Any], values: list[ast.expr]) -> dict[str, Any]:
    if not all(isinstance(name, str) for name in names):
        raise ValueError
    return {name: _literal(value) for name, value in zip(names, values, strict=True)}
