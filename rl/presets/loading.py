"""Presets from the files of this package, and from files of your own."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from ..algorithms import ALGORITHMS
from ..options import convert
from .zoo import Target, translate

_DEFAULT = "default"


@dataclass(frozen=True)
class Preset:
    """Options of an algorithm in an environment.

    Attributes:
        options: fields of the algorithm's config, by name.
        total_timesteps: environment steps to train for; None where the file does not say.

    """

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
        ValueError: an unknown algorithm, no entry for the environment, an unknown option, a value
            of the wrong type or out of range, or a file that is not such a YAML file.
        FileNotFoundError: there is no such file.

    Example:
        >>> preset = load_preset("trpo", "Pendulum-v1")
        >>> preset.options["gamma"]
        0.9

    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    if file is None:
        source, text = f"presets of {algorithm}", _packaged(algorithm)
    else:
        source, text = str(file), _read(Path(file))
    entries = _parse(source, text)
    if env_id not in entries and _DEFAULT not in entries:
        near = get_close_matches(env_id, map(str, entries), n=3, cutoff=0)
        raise ValueError(
            f"{source}: no entry for {env_id!r}; the nearest are {', '.join(near) or 'none'}"
        )
    try:
        return _preset(algorithm, env_id, entries.get(env_id, entries.get(_DEFAULT)))
    except ValueError as error:
        raise ValueError(f"{source}, {env_id}: {error}") from error


def _packaged(algorithm: str) -> str:
    folder = resources.files("rl.presets")
    files = {name: folder / f"{name}.yml" for name in ALGORITHMS}
    if not files[algorithm].is_file():
        there = ", ".join(name for name, file in files.items() if file.is_file())
        raise ValueError(
            f"there are presets for {there}, none for {algorithm}: give a file of your own"
        )
    return files[algorithm].read_text(encoding="utf-8")


def _read(file: Path) -> str:
    if not file.exists():
        raise FileNotFoundError(f"no preset file at {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file: {error}") from error


def _parse(source: str, text: str) -> dict[str, Any]:
    """Return what a text of YAML maps environments to."""
    import yaml

    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"{source} must map environment ids to options, got {type(entries).__name__}"
        )
    return entries


def _preset(algorithm: str, env_id: str, entry: Any) -> Preset:
    if not isinstance(entry, dict):
        raise ValueError(f"an entry must map options to values, got {entry!r}")
    config_class = ALGORITHMS[algorithm].config_class
    kinds = {**get_type_hints(config_class), "total_timesteps": int}
    own = {k: convert(k, kinds[k], v, text=True) for k, v in entry.items() if k in kinds}
    target = Target(algorithm, env_id, n_envs=own.get("n_envs", 1), kinds=kinds)
    options = translate({k: v for k, v in entry.items() if k not in kinds}, target) | own
    total_timesteps = options.pop("total_timesteps", None)
    if total_timesteps is not None and total_timesteps < 1:
        raise ValueError(f"total_timesteps must be at least 1, got {total_timesteps}")
    config_class(**options)  # checks the ranges
    return Preset(options, total_timesteps)
