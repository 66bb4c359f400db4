"""Slow and obviously right versions of what the package computes, never copies of it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch import distributions as td


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    parts = vector.split([t.numel() for t in like])
    return [part.reshape(t.shape) for part, t in zip(parts, like, strict=True)]


def factors(prediction):
    if isinstance(prediction, td.Distribution):
        return [prediction]
    parts = prediction.values() if isinstance(prediction, dict) else prediction
    return list(itertools.chain.from_iterable(factors(part) for part in parts))


def kl(old, new) -> Tensor:
    """Mean over the first batch dimension of torch's own KL(old || new), summed over the rest."""
    size = factors(old)[0].batch_shape[0] if factors(old)[0].batch_shape else 1
    pairs = zip(factors(old), factors(new), strict=True)
    return sum(td.kl_divergence(p, q).sum() for p, q in pairs) / size


def kl_hessian(predict, params) -> Tensor:
    """Dense Hessian of torch's KL(theta || .) at theta, by torch's own hessian."""
    theta = flatten([p.detach() for p in params])
    old = predict([p.detach() for p in params])
    return torch.autograd.functional.hessian(
        lambda v: kl(old, predict(unflatten(v, params))), theta
    )


def score_covariance(predict, params) -> Tensor:
    """Sum over every outcome of p(y) score score', mean over the batch (discrete families)."""
    theta = flatten([p.detach() for p in params])
    prediction = predict(params)
    size = factors(prediction)[0].batch_shape[0]
    total = torch.zeros(len(theta), len(theta), dtype=theta.dtype)
    for index, factor in enumerate(factors(prediction)):
        for outcome in factor.enumerate_support():

            def log_prob(v, index=index, outcome=outcome):
                factor = factors(predict(unflatten(v, params)))[index]
                return factor.log_prob(outcome).reshape(-1)

            scores = torch.autograd.functional.jacobian(log_prob, theta)
            weights = log_prob(theta).exp()
            total += torch.einsum("b,bi,bj->ij", weights, scores, scores)
    return total / size


def textbook_cg(A: Tensor, b: Tensor, iterations: int) -> list[Tensor]:
    """The iterates of conjugate gradients as minimisers over explicit Krylov spaces."""
    iterates, basis = [], []
    v = b
    for _ in range(iterations):
        for _ in range(2):  # orthogonalise twice
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / v.norm())
        v = A @ basis[-1]
        Q = torch.stack(basis, 1)
        iterates.append(Q @ torch.linalg.solve(Q.T @ A @ Q, Q.T @ b))
    return iterates


def gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Advantages by their definition: a sum over the rest of the episode for every step."""
    T, N = rewards.shape
    advantages = torch.zeros_like(rewards)
    for i in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                future = 0.0 if terminated[k, i] else gamma * next_values[k, i]
                advantages[t, i] += weight * (rewards[k, i] + future - values[k, i])
                if terminated[k, i] or truncated[k, i]:
                    break
                weight *= gamma * gae_lambda
    return advantages
