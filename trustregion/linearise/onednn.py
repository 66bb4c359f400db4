"""Matrix products by oneDNN, where torch's own run at half the speed of the processor.

torch multiplies float32 matrices on x86 by Intel's MKL, which does not use the wide registers of
AMD's processors. The oneDNN library inside torch does: measured on a Zen 5, products of the sizes
of a policy's layers take 0.40 to 0.50 of the time. It is reached through the operator that torch's
own compiler emits.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .. import recorded
from .arithmetic import FACTORS, MatrixProduct
from .rules import Rule, Site, Tangents

_WORTH_A_CALL = 1e6  # operations; a call takes about 14 microseconds more than one of torch's
_NARROW = 16  # columns of an output below which torch's own products are faster backwards


def fits(site: Site) -> bool:
    """Whether a matrix product is one that oneDNN does faster."""
    place, node = site.outputs[0], site.node
    if not (place.dtype is torch.float32 and place.device.type == "cpu" and len(place.shape) == 2):
        return False
    added = site.inputs[0] if len(site.needs) == 3 else None
    row = added is None or len(added.shape) == 1
    unscaled = all(
        recorded.saved(node, x) == 1 for x in ("alpha", "beta") if recorded.saves(node, x)
    )
    inner = _inner(site)
    worth = 2 * place.numel * inner > _WORTH_A_CALL
    used = any(site.needs[-2:]) and torch.backends.mkldnn.enabled and _on_amd()
    return row and unscaled and worth and used


def _inner(site: Site) -> int:
    """Return the number of terms in each sum of the product; 0 where the node does not tell."""
    sizes = f"{FACTORS[recorded.name(site.node)][0]}_sym_sizes"
    return site.number(sizes)[1] if recorded.saves(site.node, sizes) else 0


@cache
def _on_amd() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    if recorded.onednn_linear() is None:
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in text


def _times(x: Tensor, w: Tensor, added: Tensor | None = None) -> Tensor:
    """Return ``x w'``, plus a row."""
    if added is not None:  # it is read as if it were contiguous
        added = added.expand(w.shape[0]).contiguous()
    return cast(Any, recorded.onednn_linear())(_dense(x), _dense(w), added)


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


class DenseProduct(Rule):
    """``c + A B`` of matrices, for ``c`` a row or nothing."""

    fresh = gives = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.plain = MatrixProduct(site)
        self.plain.cotangents = self.cotangents
        self.narrow = site.outputs[0].shape[1] < _NARROW
        self.left: Tensor | None = None

    def writes(self, which: int) -> bool:
        """Whether it is ``B``, or a row that is added; ``A`` gets a new tensor."""
        return which != len(self.site.needs) - 2 and self.plain.writes(which)

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``dc + dA B + A dB``."""
        row = tangents[0] if self.plain.added else None
        out, *more = self.plain.terms(tangents)
        result = _times(out[0], out[1].mT, row)
        for x, y in more:  # faster by itself than as the addend of the next product
            result.add_(_times(x, y.mT))
        return result

    def vjp(self, cotangents: Tangents) -> Sequence[Tensor | None]:
        """Return the cotangents of ``c``, ``A`` and ``B``."""
        if self.narrow:
            return self.plain.vjp(cotangents)
        u = cast(Tensor, cotangents[0])
        a, b = self.plain.a, self.plain.b
        if self.left is None and a is not None:
            self.left = a.mT.contiguous()
        out = [self.plain.added_cotangent(u)] if self.plain.added else []
        out.append(None if b is None else _times(u, b))
        db = None if self.left is None else _times(self.left, u.mT)
        place = self.cotangents[-1]
        out.append(db if db is None or place is None else place.copy_(db))
        return out
