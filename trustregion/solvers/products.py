"""Products with ``A`` for the kernels, one vector at a time or in blocks.

A kernel is a generator that yields a float64 vector ``p`` and is sent ``A p``, whether the product
was computed alone or as a column of a block.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..operators.base import LinearOperator, product

T = TypeVar("T")
Asks = Generator[Tensor, Tensor, T]


def answer(A: LinearOperator, asks: Asks[T]) -> T:
    """Run a kernel, send it the products it asks for, and return what it returns.

    ``A`` receives vectors of its own dtype. Only the first product is checked: at small ``n`` the
    check takes a tenth of an iteration.
    """
    try:
        p = next(asks)
        if A.dtype is p.dtype:
            Ap = product(A, p)
            while True:
                Ap = A.mv(asks.send(Ap))
        narrow, wide = torch.empty_like(p, dtype=A.dtype), torch.empty_like(p)
        wide.copy_(product(A, narrow.copy_(p)))
        while True:
            narrow.copy_(asks.send(wide))
            wide.copy_(A.mv(narrow))
    except StopIteration as end:
        return end.value


def answer_in_blocks(A: LinearOperator, kernels: Sequence[Asks[T]]) -> list[T]:
    """Run several kernels, compute their products in blocks, and return their results."""
    returned: dict[int, T] = {}
    buffers: dict[int, Tensor] = {}  # the products in float64, as the kernels take them
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(kernels)))
    while answers:
        asked: dict[int, Tensor] = {}
        for i, Ap in answers.items():
            try:
                asked[i] = kernels[i].send(Ap)  # type: ignore[arg-type]  # None starts it
            except StopIteration as end:
                returned[i] = end.value
        if not asked:
            break
        P = torch.stack(list(asked.values()), dim=1)
        wide = P.dtype
        P = P if A.dtype is wide else P.to(A.dtype)
        AP = A.mm(P)
        if AP.shape != P.shape or AP.dtype is not P.dtype:
            raise ValueError(
                f"the operator must map a block of shape {tuple(P.shape)} and dtype {P.dtype} to"
                f" one alike, got shape {tuple(AP.shape)} and dtype {AP.dtype}"
            )
        rows = dict(zip(asked, AP.T.contiguous(), strict=True))
        if A.dtype is not wide:
            for i, Ap in rows.items():
                buffers[i] = buffers[i] if i in buffers else torch.empty_like(Ap, dtype=wide)
                rows[i] = buffers[i].copy_(Ap)
        answers = dict(rows)
    return [returned[i] for i in range(len(kernels))]
