from __future__ import annotations

import importlib.util

import pytest

# The doctest collector imports every module; these need sb3-contrib, which the test skips without.
collect_ignore = (
    [] if importlib.util.find_spec("sb3_contrib") else ["cases.py", "peers.py", "report.py"]
)


def pytest_configure(config: pytest.Config) -> None:
    # sb3-contrib logs the mean of its critic's losses, and here it trains no critic.
    for message in ("Mean of empty slice", "invalid value encountered in scalar divide"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
