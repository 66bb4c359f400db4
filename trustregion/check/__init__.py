"""A self-test for closures, before the first step is taken."""

from .closure import check_closure
from .report import ClosureCheck, ClosureReport

__all__ = [
    "check_closure",
    "ClosureCheck",
    "ClosureReport",
]
