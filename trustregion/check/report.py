"""The report of a self-test, as a table."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class ClosureCheck:
    """The outcome of one check.

    Attributes:
        name: The property that should hold.
        passed: Whether it holds; None if the measurement is inconclusive.
        value: The measured number; NaN if there is none.
        measured: The measurement in words.
        advice: What to do if the check did not pass.

    """

    name: str
    passed: bool | None
    value: float
    measured: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class ClosureReport:
    """The report of :func:`check_closure`; ``print(report)`` shows it as a table.

    Attributes:
        checks: The checks, in the order in which they were made.

    """

    checks: tuple[ClosureCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed; an inconclusive check does not count as failed."""
        return all(check.passed is not False for check in self.checks)

    def raise_for_failure(self) -> None:
        """Raise a ValueError with the table unless the report is :attr:`ok`."""
        if not self.ok:
            raise ValueError(f"the closure fails its self-test\n{self}")

    def __str__(self) -> str:
        """Return a table for the terminal, with advice below each check that did not pass."""
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
