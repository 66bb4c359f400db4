"""Who multiplies: a solve asks for products with ``A``, one vector at a time or in blocks.

A kernel is a generator that yields a vector ``p`` in float64 and is sent ``A p``. It therefore does
not know whether its product was computed alone or as one column of a block.
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
    """Give a kernel the products it asks for, and return what it returns.

    ``A`` is given vectors of its own dtype. Its first product is checked; to check each would take
    a tenth of an iteration at small n.
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
    """Give several kernels their products in blocks, and return what each of them returns."""
    returned: dict[int, T] = {}
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
        P = torch.stack(list(asked.values()), dim=1).to(A.dtype)
        AP = A.mm(P)
        if AP.shape != P.shape or AP.dtype is not P.dtype:
            raise ValueError(
                f"the operator must map a block of shape {tuple(P.shape)} and dtype {P.dtype} to"
                f" one alike, got shape {tuple(AP.shape)} and dtype {AP.dtype}"
            )
        rows = (Ap.double() for Ap in AP.T.contiguous())
        answers = dict(zip(asked, rows, strict=True))
    return [returned[i] for i in range(len(kernels))]
