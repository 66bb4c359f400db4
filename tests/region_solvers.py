"""The trust-region solvers, which many laws hold for alike."""

import pytest

from trustregion import gltr, steihaug
from trustregion.solvers import trust_region_dense

SOLVERS = [steihaug, gltr, trust_region_dense]
every = pytest.mark.parametrize("solver", SOLVERS)
