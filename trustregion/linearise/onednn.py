"""Matrix products by oneDNN, where torch's own run at half the speed of the processor.

torch multiplies float32 matrices on x86 by Intel's MKL, which does not use the wide registers of
AMD's processors. The oneDNN library inside torch does: measured on a Zen 5, products of the sizes
of a policy's layers take 0.40 to 0.50 of the time. It is reached through the operator that torch's
own compiler emits.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .arithmetic import MatrixProduct
from .rules import Rule, Site, Tangents

_WORTH_A_CALL = 3e6  # operations; a call takes about 14 microseconds more than one of torch's


def fits(site: Site) -> bool:
    """Whether a matrix product is one that oneDNN does faster."""
    place, node = site.outputs[0], site.node
    row = len(site.needs) == 2 or site.inputs[0] is None or len(site.inputs[0].shape) == 1
    sizes = getattr(node, "_saved_mat1_sym_sizes", None) or getattr(
        node, "_saved_self_sym_sizes", (0, 0)
    )
    return (
        place.dtype is torch.float32
        and place.device.type == "cpu"
        and len(place.shape) == 2
        and any(site.needs[-2:])
        and row
        and getattr(node, "_saved_alpha", 1) == getattr(node, "_saved_beta", 1) == 1
        and 2 * place.numel * sizes[1] > _WORTH_A_CALL
        and torch.backends.mkldnn.enabled
        and _on_amd()
    )


@cache
def _on_amd() -> bool:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None or not {"default", "binary"} <= set(operator.overloads()):
        return False
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else platform.processor()
    return "AuthenticAMD" in text


def _times(x: Tensor, w: Tensor, added: Tensor | None = None) -> Tensor:
    """Return ``x w'``, plus a row."""
    return torch.ops.mkldnn._linear_pointwise(x, w, added, "none", [], "")


class DenseProduct(Rule):
    """``c + A B`` of matrices, for ``c`` a row or nothing."""

    fresh = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.plain = MatrixProduct(site)
        self.plain.cotangents = self.cotangents
        self.left: Tensor | None = None

    def writes(self, which: int) -> bool:
        """Whether it is ``B``, or a row that is added; ``A`` gets a new tensor."""
        return which != len(self.site.needs) - 2 and self.plain.writes(which)

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return the change of the product."""
        a, b = self.plain.a, self.plain.b
        c = tangents[0] if self.plain.added else None
        da, db = tangents[-2:]
        pairs = [(da, b), (a, db)]
        first, *second = [(x, y) for x, y in pairs if x is not None and y is not None]
        out = _times(first[0], first[1].mT, c)
        for x, y in second:
            out = torch.ops.mkldnn._linear_pointwise.binary(x, out, y.mT, None, "add")
        return out

    def vjp(self, cotangents: Tangents) -> list[Tensor | None]:
        """Return the cotangents of ``c``, ``A`` and ``B``."""
        (u,) = cotangents
        assert u is not None
        a, b = self.plain.a, self.plain.b
        if self.left is None and a is not None:
            self.left = a.mT.contiguous()
        out = [self.plain.added_cotangent(u)] if self.plain.added else []
        out.append(None if b is None else _times(u, b))
        db = None if self.left is None else _times(self.left, u.mT)
        place = self.cotangents[-1]
        out.append(db if db is None or place is None else place.copy_(db))
        return out
