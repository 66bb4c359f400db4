from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # sb3-contrib logs the mean of its critic's losses, and here it trains no critic.
    for message in ("Mean of empty slice", "invalid value encountered in scalar divide"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
