"""Data and operators that the tests of batches share."""

import torch
from torch import distributions as td

from trustregion import FisherOperator

F64 = torch.float64
N = 12
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
LABELS = torch.randint(4, (N,), generator=torch.Generator().manual_seed(2))


def weights(dtype=F64):
    g = torch.Generator().manual_seed(3)
    return torch.randn(3, 4, generator=g, dtype=F64).to(dtype).requires_grad_()


def linear(W, x=X):
    return td.Categorical(logits=x.to(W.dtype) @ W)


def fisher(W):
    return lambda x: FisherOperator(linear(W, x), [W])
