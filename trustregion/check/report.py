"""What a self-test found, as a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class ClosureCheck:
    """One thing that should hold.

    Attributes:
        name: what it is.
        passed: whether it does; None where the measurement cannot tell.
        value: what was measured; NaN where nothing was.
        measured: the same in words.
        advice: what to do unless it passed.

    """

    name: str
    passed: bool | None
    value: float
    measured: str
    advice: str


@dataclass(frozen=True)
class ClosureReport:
    """What :func:`check_closure` found; ``print(report)`` is a table.

    Attributes:
        checks: what was measured, in order.

    """

    checks: tuple[ClosureCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed. One that cannot tell is no failure: see the table."""
        return all(check.passed is not False for check in self.checks)

    def raise_for_failure(self) -> None:
        """Raise a ValueError with the table unless the report is :attr:`ok`."""
        if not self.ok:
            raise ValueError(f"the closure fails its self-test\n{self}")

    def __str__(self) -> str:
        """Return a table for the terminal, with advice below what did not pass."""
        words = {True: "ok", False: "FAILED", None: "unknown"}
        width = max(len(check.name) for check in self.checks)
        lines: list[str] = []
        for check in self.checks:
            lines.append(f"{words[check.passed]:<8} {check.name:<{width}}  {check.measured}")
            if not check.passed:
                lines += textwrap.wrap(
                    check.advice, 92, initial_indent=f"{'':9}-> ", subsequent_indent=f"{'':12}"
                )
        passed, failed, unknown = (
            sum(check.passed is outcome for check in self.checks) for outcome in words
        )
        return "\n".join([*lines, f"{passed} passed, {failed} failed, {unknown} unknown"])
