"""Observations of any space as flat rows, and what lies where in a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from gymnasium import Space, spaces

from .batches import batch_size
from .masks import MASK, mask_of_each, whole_masks

_SMALLEST_IMAGE = 8  # pixels per side; a smaller array of bytes is a list of numbers


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
        wide: whether its numbers may be of a type that float32 rounds.

    """

    name: str
    kind: str
    start: int
    shape: tuple[int, ...]
    wide: bool = field(default=False, repr=False)

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + math.prod(self.shape)

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
        origin: float64 ``(width,)``, subtracted from observations before they become float32; None
            for zeros. See :meth:`with_origin`.

    Raises:
        ValueError: a space that has no such form, or an origin of another shape.

    Example:
        >>> space = spaces.Dict(position=spaces.Box(-1, 1, (2,)), gear=spaces.Discrete(3))
        >>> layout = ObservationLayout(space)
        >>> layout.flat({"position": np.zeros((1, 2)), "gear": np.array([2])})
        array([[0., 0., 0., 0., 1.]], dtype=float32)
        >>> layout.parts[0]
        Part(name='position', kind='vector', start=0, shape=(2,))

    """

    def __init__(self, space: Space[Any], mask: int = 0, origin: np.ndarray | None = None) -> None:
        self.space = space
        self.parts: tuple[Part, ...] = tuple(_parts("", space, 0))
        self.info_mask: Part | None = None
        if mask:
            self.info_mask = Part(MASK, "mask", self.width, (mask,))
            self.parts += (self.info_mask,)
        self._masks = self.of_kind("mask")
        if len(self._masks) > 1:
            raise ValueError(f"several action masks, in {space} and in the environment's infos")
        images = all(part.kind == "image" for part in self.parts)
        self.dtype = np.dtype(np.uint8 if images else np.float32)
        self.origin = None if origin is None else np.asarray(origin, np.float64)
        if self.origin is not None and self.origin.shape != (self.width,):
            raise ValueError(f"origin must have shape {(self.width,)}, got {self.origin.shape}")

    def with_origin(self, observations: Any) -> Self:
        """Return this layout with its origin at the first observation of a batch.

        float32 has seven digits: those of a time in seconds since 1970 end at two minutes. So what
        comes in a wider type is measured from its first value, unless that is not finite.
        """
        wide = [c for part in self.parts if part.wide for c in range(part.start, part.stop)]
        if not wide:
            return self
        rows = np.zeros((batch_size(self.space, observations), self.width))
        _write(self.space, observations, rows, 0, None)
        layout = copy(self)
        layout.origin = np.zeros(self.width)
        layout.origin[wide] = np.where(np.isfinite(rows[0, wide]), rows[0, wide], 0.0)
        return layout

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
        self,
        observations: Any,
        infos: Mapping[str, Any] | None = None,
        ended: np.ndarray | bool = False,
    ) -> np.ndarray:
        """Return a batch of observations as new rows, ``(N, width)``; see :meth:`write`."""
        rows = np.empty((batch_size(self.space, observations), self.width), self.dtype)
        self.write(observations, rows, infos, ended)
        return rows

    def write(
        self,
        observations: Any,
        rows: np.ndarray,
        infos: Mapping[str, Any] | None = None,
        ended: np.ndarray | bool = False,
    ) -> None:
        """Write a batch of observations into rows ``(N, width)``.

        Args:
            observations: the batch.
            rows: where to write.
            infos: where the masks are, if they are not in the observations.
            ended: bool, or bool ``(N,)``; True where no action will be chosen, since the episode
                ended. Masks are all ones there, and may be missing.

        Raises:
            ValueError: observations of another shape, a choice that is not in its space, a mask
                that is missing, or one that comes up though the first reset gave none.

        """
        _write(self.space, observations, rows, 0, self.origin)
        infos, n = infos or {}, len(rows)
        unexpected = MASK in infos and self.info_mask is None
        if unexpected and any(mask is not None for mask in mask_of_each(infos, n)):
            raise ValueError(
                f"the environment gave infos[{MASK!r}], and none at its first reset, so nothing was"
                " set up to obey it: give a mask at every reset too, all ones if everything is"
                " allowed"
            )
        for part in self._masks:  # one at most
            over = np.broadcast_to(ended, n)
            if part is self.info_mask:
                rows[:, part.columns] = whole_masks(infos, over, part.shape[0])
            else:
                rows[over, part.columns] = 1


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
    wide = isinstance(space, spaces.Box) and not np.can_cast(space.dtype, np.float32)
    yield Part(name, kind, start, shape, wide and kind == "vector")


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


def _write(
    space: Space[Any], observations: Any, rows: np.ndarray, start: int, origin: np.ndarray | None
) -> int:
    """Write a batch from a column on; return one past the last column written."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        pairs = space.items() if isinstance(space, spaces.Dict) else enumerate(space)
        for key, inner in pairs:
            start = _write(inner, observations[key], rows, start, origin)
        return start
    values, shape = np.asarray(observations), space.shape or ()
    size = math.prod(shape)
    if values.size != len(rows) * size:
        raise ValueError(
            f"a batch of {len(rows)} observations of {space} must have shape"
            f" {(len(rows), *shape)}, got {values.shape}"
        )
    entries = values.reshape(len(rows), size)
    if isinstance(space, spaces.Discrete):
        return _write_one_hot(entries[:, 0], int(space.n), int(space.start), rows, start)
    if isinstance(space, spaces.MultiDiscrete):
        counts = zip(entries.T, space.nvec.flat, space.start.flat, strict=True)
        for entry, n, first in counts:
            start = _write_one_hot(entry, int(n), int(first), rows, start)
        return start
    stop = start + size
    if origin is not None and origin[start:stop].any():
        entries = entries.astype(np.float64) - origin[start:stop]
    rows[:, start:stop] = entries
    return stop


def _write_one_hot(choices: np.ndarray, n: int, first: int, rows: np.ndarray, start: int) -> int:
    block = rows[:, start : start + n]
    block[:] = choices[:, None] == np.arange(first, first + n)
    if not block.any(1).all():
        raise ValueError(
            f"an observation is not in its space: it must be a whole number from {first} to"
            f" {first + n - 1}, and the batch goes from {choices.min()} to {choices.max()}"
        )
    return start + n
