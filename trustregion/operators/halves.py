"""Two halves of a batch, for a product that the memory is too small for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def halves(batch: Any) -> tuple[Any, Any] | None:
    """Return the two halves of a batch along the first dimension of its tensors.

    A batch is a tensor, or a dict, list or tuple of tensors and other values. All tensors must have
    as many slices, at least two; other values go to both halves. None for any other batch.

    Example:
        >>> import torch
        >>> halves((torch.arange(3), "labels"))
        ((tensor([0]), 'labels'), (tensor([1, 2]), 'labels'))

    """
    sizes = {t.shape[0] if t.ndim else 0 for t in _tensors(batch)}
    if len(sizes) != 1 or max(sizes) < 2:
        return None
    (n,) = sizes
    return _sliced(batch, slice(n // 2)), _sliced(batch, slice(n // 2, n))


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _sliced(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, Mapping):
        return {key: _sliced(part, rows) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_sliced(part, rows) for part in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
