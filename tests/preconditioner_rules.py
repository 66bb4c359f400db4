"""Matrices for the tests of preconditioners, and a solve that a rule learns from."""

import torch

from trustregion import (
    Identity,
    cg,
)


def damped(A, damping):
    return A + damping * Identity(A.shape[0], A.dtype)


def spread(n=40, high=4.0, dtype=torch.float64, seed=0):
    """A matrix with eigenvalues from 1 to 10^high, in general position."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    A = (Q * torch.logspace(0, high, n, dtype=torch.float64)) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def learn(rule, A, damping, b, max_iter=15, M=None):
    """Show a rule one solve."""
    solve = cg(damped(rule.watch(A), damping), b, M=M, rtol=1e-9, max_iter=max_iter)
    rule.observe(solve)
    return solve
