"""Matrix products by oneDNN, where torch's own run at half the speed of the processor.

torch multiplies float32 matrices on x86 by Intel's MKL, which on AMD's processors uses registers of
256 bits only. Up to Zen 4 these processors multiply no more than that at a time, and MKL is as fast
as any. Zen 5 multiplies 512 bits, which the oneDNN library inside torch makes use of: products of
the sizes of a policy's layers take 0.40 to 0.50 of the time. It is reached through the operator
that torch's own compiler emits, which is used only if its schema is the known one and if it has
multiplied small matrices as torch does.

Which library multiplies decides the last bits of a step. The choice is therefore never timed: it
follows from the processor and from :func:`prefer_onednn`, and is the same in each process on a
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from .. import recorded
from .arithmetic import FACTORS, NARROW, MatrixProduct
from .rules import Rule, Site, Tangents

# Operations. A call takes about 14 microseconds more than one of torch's, which does 3e6 in 30.
_WORTH_A_CALL = 3e6
_preferred: bool | None = None


def prefer_onednn(choice: bool | None) -> None:
    """Set whether Jacobian products use oneDNN for float32 matrices on the CPU.

    The setting applies to operators that are built afterwards. torch's own products are used in any
    case if oneDNN is missing, is turned off by :func:`torch.backends.mkldnn.flags`, or does not
    agree with torch on small matrices.

    Args:
        choice: True or False, or None for the default: oneDNN is used on AMD processors from Zen 5
            on, where it was measured to be faster, if torch was built with MKL. The two libraries
            round differently, so that bit-identical runs on different machines need the same
            explicit choice on all of them.

    Raises:
        TypeError: the choice is neither a bool nor None.

    """
    global _preferred  # one setting for the process, as torch's own
    if choice is not None and not isinstance(choice, bool):
        raise TypeError(f"choice must be True, False or None, got {type(choice).__name__}")
    _preferred = choice


def fits(site: Site) -> bool:
    """Return whether a matrix product is one that oneDNN is to do."""
    place, node = site.outputs[0], site.node
    if not (place.dtype is torch.float32 and place.device.type == "cpu" and len(place.shape) == 2):
        return False
    added = site.inputs[0] if len(site.needs) == 3 else None
    row = added is None or len(added.shape) == 1
    scales = [recorded.saved(node, x) for x in ("alpha", "beta") if recorded.saves(node, x)]
    unscaled = all(scale == 1 for scale in scales)
    worth = 2 * place.numel * _inner(site) > _WORTH_A_CALL
    return row and unscaled and worth and any(site.needs[-2:]) and _is_chosen()


def _inner(site: Site) -> int:
    """Return the number of terms in each sum of the product; 0 where the node does not tell."""
    sizes = f"{FACTORS[recorded.name(site.node)][0]}_sym_sizes"
    return site.number(sizes)[1] if recorded.saves(site.node, sizes) else 0


def _is_chosen() -> bool:
    chosen = _is_measured_faster() if _preferred is None else _preferred
    return chosen and torch.backends.mkldnn.enabled and _multiplies_as_torch()


@cache
def _is_measured_faster() -> bool:
    """Return whether this is an AMD Zen 5 or later, as torch tells, and torch would use MKL."""
    tells = getattr(torch.cpu, "get_capabilities", dict)()
    # The first of AMD's with this instruction multiplies 512 bits at a time.
    wide = str(tells.get("cpu_name")).startswith("AMD") and bool(tells.get("avx_vnni"))
    return wide and torch.backends.mkl.is_available()


@cache
def _multiplies_as_torch() -> bool:
    """Return whether oneDNN's operator exists and agrees with torch on matrices of each layout."""
    if recorded.onednn_linear() is None:
        return False
    x, w, row = (torch.arange(n, dtype=torch.float32).sin() for n in (15, 20, 4))
    try:
        for a in (x.view(3, 5), x.view(5, 3).t()):
            for b in (w.view(4, 5), w.view(5, 4).t()):
                for added in (None, row):
                    right = a @ b.t() if added is None else torch.addmm(added, a, b.t())
                    if not torch.allclose(_times(a, b, added), right, rtol=1e-5, atol=1e-5):
                        return False
    except (RuntimeError, TypeError):
        return False
    return True


def _times(x: Tensor, w: Tensor, added: Tensor | None = None) -> Tensor:
    """Return ``x w'``, plus a row."""
    if added is not None:  # The operator reads it as if it were contiguous.
        added = added.expand(w.shape[0]).contiguous()
    return cast(Any, recorded.onednn_linear())(_dense(x), _dense(w), added)


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


class DenseProduct(Rule):
    """``c + A B`` for matrices, where ``c`` is a row or absent."""

    fresh = gives = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.plain = MatrixProduct(site)
        self.plain.cotangents = self.cotangents
        self.narrow = site.outputs[0].shape[1] < NARROW
        self.left: Tensor | None = None

    def writes(self, which: int) -> bool:
        """Return whether the input is ``B`` or an added row; ``A`` gets a new tensor."""
        return which != len(self.site.needs) - 2 and self.plain.writes(which)

    def jvp(self, tangents: Tangents) -> Tensor:
        """Return ``dc + dA B + A dB``."""
        row = tangents[0] if self.plain.added else None
        out, *more = self.plain.terms(tangents)
        result = _times(out[0], out[1].mT, row)
        for x, y in more:  # An extra addition is faster than a fused addend.
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
