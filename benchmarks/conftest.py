from __future__ import annotations

import importlib.util

import pytest

# The doctest collector imports every module; these need the peers, which the tests skip without.
collect_ignore = ["curvature.py", "curvature_cost.py", "curvature_memory.py", "curvature_peers.py"]
collect_ignore += ["jax_product.py"]  # for the environment that has JAX
if not importlib.util.find_spec("sb3_contrib"):
    collect_ignore += ["cases.py", "peers.py", "report.py"]
if not all(map(importlib.util.find_spec, ("sb3_contrib", "linear_operator", "torchopt"))):
    collect_ignore += ["pairs.py", "solver_peers.py", "solvers.py"]


def pytest_configure(config: pytest.Config) -> None:
    # sb3-contrib logs the mean of its critic's losses, and here it trains no critic.
    for message in ("Mean of empty slice", "invalid value encountered in scalar divide"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
