"""The root of a Fisher matrix, compared with the matrix itself."""

import pytest
import torch

from strategies import DTYPES
from trustregion import to_dense

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def columns(R):
    """The matrix of a map by its products with ``R``, column by column."""
    return torch.stack([R.mv(e) for e in torch.eye(R.shape[1], dtype=R.dtype)], dim=1)


def check_root(F, rounding=50.0):
    R = F.root()
    assert (R.shape, R.dtype) == (F.jacobian.shape, F.dtype)
    matrix, exact = columns(R).double(), to_dense(F).double()
    atol = rounding * torch.finfo(F.dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(matrix.T @ matrix, exact, rtol=0, atol=atol)
    atol = rounding * torch.finfo(F.dtype).eps * matrix.abs().max().item()
    torch.testing.assert_close(R.rows().double(), matrix, rtol=0, atol=atol)
    return R
