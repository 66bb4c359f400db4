"""What every symmetric operator must satisfy."""

from __future__ import annotations

import torch

from trustregion import to_dense


def check_operator(A, dense, tolerance=1e-9):
    """It equals a dense matrix, is symmetric and linear, leaves its input alone, and repeats."""
    size = dense.abs().max().item()
    torch.testing.assert_close(to_dense(A), dense, rtol=0, atol=tolerance * size)
    u, v = torch.randn(2, A.shape[0], dtype=A.dtype)
    kept, product = v.clone(), A @ v
    assert torch.equal(v, kept)
    assert not product.requires_grad
    bound = tolerance * size * A.shape[0]
    torch.testing.assert_close(u @ product, v @ (A @ u), rtol=0, atol=bound)
    torch.testing.assert_close(A @ (u + 2 * v), A @ u + 2 * product, rtol=0, atol=bound)
    assert torch.equal(A @ v, product)
