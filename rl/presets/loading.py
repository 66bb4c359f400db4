"""Presets from the files of this package, and from files of your own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ..algorithms import ALGORITHMS
from ..options import convert
from .zoo import Target, translate

_MOST = 2**18  # characters of a file, and of what it says


@dataclass(frozen=True)
class Preset:
    """Fields of an algorithm's config, by name, and the steps to train for, if the file says."""

    options: dict[str, Any]
    total_timesteps: int | None = None


def load_preset(algorithm: str, env_id: str, file: str | Path | None = None) -> Preset:
    """Return the options for an environment, checked against the algorithm's config.

    A file maps environment ids to options: fields of the algorithm's config and
    ``total_timesteps``, or the hyper-parameters of rl-baselines3-zoo, which are translated. Where a
    file has both for one option, the field's name wins. As in the zoo, an entry ``default`` is
    that of every environment which has none of its own.

    Args:
        algorithm: its name, such as ``"trpo"``.
        env_id: the environment.
        file: a YAML file of your own; by default the one that comes with this package.

    Raises:
        ValueError: an unknown algorithm, environment or option, or a wrong value or file.

    Example:
        >>> preset = load_preset("trpo", "Pendulum-v1")
        >>> preset.options["gamma"]
        0.9

    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    source = f"presets of {algorithm}" if file is None else str(file)
    entries = _parse(source, _packaged(algorithm) if file is None else Path(file).read_bytes())
    if env_id not in entries and "default" not in entries:
        near = get_close_matches(env_id, map(str, entries), n=3, cutoff=0)
        nearest = ", ".join(near) or "none"
        raise ValueError(f"{source}: no entry for {env_id!r}; the nearest are {nearest}")
    try:
        return _preset(algorithm, env_id, entries.get(env_id, entries.get("default")))
    except ValueError as error:
        raise ValueError(f"{source}, {env_id}: {error}") from error


def _packaged(algorithm: str) -> bytes:
    folder = resources.files("rl.presets")
    files = {name: folder / f"{name}.yml" for name in ALGORITHMS}
    there = [name for name, file in files.items() if file.is_file()]
    if algorithm not in there:
        words = f"there are presets for {', '.join(there)}, none for {algorithm}"
        raise ValueError(f"{words}: give a file of your own")
    return files[algorithm].read_bytes()


def _parse(source: str, text: bytes) -> dict[str, Any]:
    """Return what a text of YAML maps environments to."""
    import yaml

    if len(text) > _MOST:
        raise ValueError(f"{source} has {len(text):,} bytes, and presets of {_MOST:,} are read")
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is not None and _size(root, {}) > _MOST:
            raise ValueError(
                f"{source} refers to its own entries until it has over {_MOST:,} bytes"
            )
        entries = None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{source} is nested too deeply") from error
    if not isinstance(entries, dict):
        kind = type(entries).__name__
        raise ValueError(f"{source} must map environment ids to options, got {kind}")
    return entries


def _size(node: Any, known: dict[int, float]) -> float:
    """Return the characters of a YAML node with all that it refers to by ``*name`` written out."""
    if id(node) not in known:
        known[id(node)] = math.inf  # of a node within itself
        inner = node.value if isinstance(node.value, list) else []
        children = [child for item in inner for child in (item if type(item) is tuple else [item])]
        own = 1 if isinstance(node.value, list) else 1 + len(node.value)
        known[id(node)] = own + sum(_size(child, known) for child in children)
    return known[id(node)]


def _preset(algorithm: str, env_id: str, entry: Any) -> Preset:
    if not isinstance(entry, dict):
        raise ValueError(f"an entry must map options to values, got {entry!r}")
    config_class = ALGORITHMS[algorithm].config_class
    kinds = get_type_hints(config_class) | {"total_timesteps": int}
    own = {k: convert(k, kinds[k], v, text=True) for k, v in entry.items() if k in kinds}
    target = Target(algorithm, env_id, own.get("n_envs", 1), kinds)
    options = translate({k: v for k, v in entry.items() if k not in kinds}, target) | own
    total_timesteps = options.pop("total_timesteps", None)
    if total_timesteps is not None and total_timesteps < 1:
        raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
    config_class(**options)  # checks the ranges
    return Preset(options, total_timesteps)
