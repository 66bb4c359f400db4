"""Observations of any space as flat rows, and what lies where in a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space, spaces

MASK = "action_mask"  # the key of the actions that are allowed, in observations and in infos
_SMALLEST_IMAGE = 8  # pixels a side; a smaller array of bytes is a list of numbers


@dataclass(frozen=True)
class Part:
    """Columns of a row that belong together.

    Attributes:
        name: path within the space, such as ``"camera"`` or ``"arm.position"``; ``""`` for a space
            that is not composed.
        kind: ``"vector"``: real numbers, flags, or one-hot choices; ``"image"``: bytes, of two or
            three dimensions; ``"mask"``: 1 for an action that is allowed.
        start: first column.
        shape: of the part, as in the space.

    """

    name: str
    kind: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + int(np.prod(self.shape))

    @property
    def columns(self) -> slice:
        """All columns."""
        return slice(self.start, self.stop)


class ObservationLayout:
    """How observations of a space lie in flat rows.

    A row holds the parts of an observation one after the other: the entries of a Box or a
    MultiBinary, a Discrete or MultiDiscrete one-hot, and the parts of a Dict or Tuple in turn. Rows
    are float32, or bytes where all parts are images. A key ``"action_mask"`` of a Dict is a mask.

    Args:
        space: of one observation.
        mask: number of actions whose mask comes with an environment's infos; 0 for none.

    Raises:
        ValueError: a space that has no such form.

    Example:
        >>> space = spaces.Dict(position=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(3))
        >>> layout = ObservationLayout(space)
        >>> layout.flat({"position": np.zeros((1, 2)), "gear": np.array([2])})
        array([[0., 0., 0., 0., 1.]], dtype=float32)
        >>> layout.parts[0]
        Part(name='position', kind='vector', start=0, shape=(2,))

    """

    def __init__(self, space: Space[Any], mask: int = 0) -> None:
        self.space = space
        self.parts: tuple[Part, ...] = tuple(_parts("", space, 0))
        self.info_mask: Part | None = None
        if mask:
            self.info_mask = Part(MASK, "mask", self.width, (mask,))
            self.parts += (self.info_mask,)
        if len(self.of_kind("mask")) > 1:
            raise ValueError(f"several action masks, in {space} and in the environment's infos")
        images = all(part.kind == "image" for part in self.parts)
        self.dtype = np.dtype(np.uint8 if images else np.float32)

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.parts[-1].stop if self.parts else 0

    def of_kind(self, kind: str) -> tuple[Part, ...]:
        """Return the parts of a kind."""
        return tuple(part for part in self.parts if part.kind == kind)

    @property
    def vector_columns(self) -> list[int]:
        """Columns of the parts that are vectors."""
        return [c for part in self.of_kind("vector") for c in range(part.start, part.stop)]

    def flat(
        self, observations: Any, infos: Mapping[str, Any] | None = None, *, mask: bool = True
    ) -> np.ndarray:
        """Return a batch of observations as new rows, ``(N, width)``.

        Args:
            observations: the batch.
            infos: where the mask is, if it is not in the observations.
            mask: False to leave the columns of that mask zero, for a state that has no action.

        """
        rows = np.zeros((batch_size(self.space, observations), self.width), self.dtype)
        if mask:
            self.write(observations, rows, infos)
        else:
            _write(self.space, observations, rows, 0)
        return rows

    def write(
        self, observations: Any, rows: np.ndarray, infos: Mapping[str, Any] | None = None
    ) -> None:
        """Write a batch of observations into rows ``(N, width)``.

        Raises:
            ValueError: an entry outside its space that has no column, or infos without a mask.

        """
        _write(self.space, observations, rows, 0)
        if self.info_mask is not None:
            if infos is None or MASK not in infos:
                raise ValueError(
                    f"the environment gave no infos[{MASK!r}], which it gave at its first reset"
                )
            masks = infos[MASK]  # gymnasium stacks them to an object array where one is missing
            rows[:, self.info_mask.columns] = np.stack(list(masks))


def batch_size(space: Space[Any], observations: Any) -> int:
    """Return how many observations a batch holds."""
    if isinstance(space, spaces.Dict):
        key, inner = next(iter(space.items()))
        return batch_size(inner, observations[key])
    if isinstance(space, spaces.Tuple):
        return batch_size(space.spaces[0], observations[0])
    return len(observations)


def as_batch(space: Space[Any], observation: Any) -> tuple[Any, bool]:
    """Return observations as a batch, and whether it was a single one.

    Raises:
        ValueError: they have the shape of neither.

    """
    if isinstance(space, spaces.Dict):
        parts = {key: as_batch(inner, observation[key]) for key, inner in space.items()}
        return {key: batch for key, (batch, _) in parts.items()}, any(s for _, s in parts.values())
    if isinstance(space, spaces.Tuple):
        pairs = [as_batch(inner, part) for inner, part in zip(space, observation, strict=True)]
        return tuple(batch for batch, _ in pairs), any(single for _, single in pairs)
    values, shape = np.asarray(observation), space.shape or ()
    if values.shape == shape:
        return values[None], True
    if values.shape[1:] != shape or values.ndim == 0:
        raise ValueError(f"obs must have shape {shape} or (batch, *{shape}), got {values.shape}")
    return values, False


def _parts(name: str, space: Space[Any], start: int) -> Iterator[Part]:
    """Yield the parts of a space, from a column on."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        pairs = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        empty = True
        for key, inner in pairs:
            for part in _parts(f"{name}.{key}" if name else str(key), inner, start):
                yield part
                start, empty = part.stop, False
        if empty:
            raise ValueError(f"unsupported observation space {space}: it has no entries")
        return
    kind, shape = "vector", _shape(space)
    if shape is None:
        raise ValueError(
            f"unsupported observation space {space}{f' at {name!r}' if name else ''}: Box,"
            " Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of them are supported. Wrap"
            " the environment, for example with gymnasium.wrappers.TransformObservation"
        )
    if 0 in shape:
        raise ValueError(f"unsupported observation space {space}: it has no entries")
    if name.rpartition(".")[2] == MASK:
        kind = "mask"
    elif _is_image(space):
        kind = "image"
    yield Part(name, kind, start, shape)


def _shape(space: Space[Any]) -> tuple[int, ...] | None:
    """Return the shape of what stands for an observation; None where nothing can."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),)
    if isinstance(space, spaces.MultiDiscrete):
        return (int(space.nvec.sum()),)
    if isinstance(space, spaces.MultiBinary):
        return space.shape
    if isinstance(space, spaces.Box) and np.dtype(space.dtype).kind in "biuf":
        return space.shape or (1,)
    return None


def _is_image(space: Space[Any]) -> bool:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    if space.low.any() or (space.high != 255).any():  # a board, not brightness
        return False
    sides = sorted(space.shape)[-2:]  # without the colours, first or last
    return len(space.shape) in (2, 3) and min(sides) >= _SMALLEST_IMAGE


def _write(space: Space[Any], observations: Any, rows: np.ndarray, start: int) -> int:
    """Write a batch from a column on; return one past the last column written."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        pairs = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for key, inner in pairs:
            start = _write(inner, observations[key], rows, start)
        return start
    values = np.asarray(observations)
    if isinstance(space, spaces.Discrete):
        return _write_one_hot(values - space.start, int(space.n), rows, start)
    if isinstance(space, spaces.MultiDiscrete):
        entries = (values - space.start).reshape(len(rows), -1)
        for entry, n in zip(entries.T, space.nvec.flat, strict=True):
            start = _write_one_hot(entry, int(n), rows, start)
        return start
    entries = values.reshape(len(rows), -1)
    stop = start + entries.shape[1]
    rows[:, start:stop] = entries
    return stop


def _write_one_hot(choices: np.ndarray, n: int, rows: np.ndarray, start: int) -> int:
    if ((choices < 0) | (choices >= n)).any():
        raise ValueError(f"an observation is choice {choices.min()} or {choices.max()} of {n}")
    rows[:, start : start + n] = choices[:, None] == np.arange(n)
    return start + n
