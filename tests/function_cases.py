"""Data for the tests of operators from functions."""

import torch

F64 = torch.float64
N = 6


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X = noise(N, 3)


def close(dense, exact, tolerance=1e-9):
    torch.testing.assert_close(dense, exact, rtol=0, atol=tolerance * exact.abs().max().item())
