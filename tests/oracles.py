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


def output_jacobian(predict, params) -> Tensor:
    """Dense Jacobian of the distributions' parameter tensors, flattened one after the other."""
    names = {
        td.Categorical: ["logits"],
        td.Bernoulli: ["logits"],
        td.Normal: ["loc", "scale"],
        td.MultivariateNormal: ["loc", "scale_tril"],
    }

    def outputs(v):
        tensors = []
        for factor in factors(predict(unflatten(v, params))):
            base = factor.base_dist if isinstance(factor, td.Independent) else factor
            tensors += [getattr(base, name) for name in names[type(base)]]
        return flatten(tensors)

    theta = flatten([p.detach() for p in params])
    return torch.autograd.functional.jacobian(outputs, theta)


def textbook_minres(A: Tensor, b: Tensor, M: Tensor, iterations: int) -> list[Tensor]:
    """The points of explicit Krylov spaces of ``M A`` and ``M b`` where ``r'Mr`` is smallest."""
    values, Q = torch.linalg.eigh(M)
    root = (Q * values.sqrt()) @ Q.T
    iterates, basis = [], []
    v = M @ b
    for _ in range(iterations):
        for _ in range(2):  # orthogonalise twice
            for q in basis:
                v = v - (q @ v) * q
        basis.append(v / v.norm())
        V = torch.stack(basis, 1)
        y = torch.linalg.lstsq(root @ A @ V, root @ b, driver="gelsd").solution
        iterates.append(V @ y)
        v = M @ (A @ basis[-1])
    return iterates


def cpo_dual(H, g, a, b, delta):
    """Theorem 2 of Achiam et al. 2017 for min g's, s'Hs / 2 <= delta, b + a's <= 0: (s, nu, mu).

    The better of the two branches of the dual; its recovery step where nothing is feasible.
    """
    x, y = torch.linalg.solve(H, g), torch.linalg.solve(H, a)
    q, r, u, bound = (g @ x).item(), (g @ y).item(), (a @ y).item(), 2 * delta
    if b > 0 and b * b / u > bound:
        return -((bound / u) ** 0.5) * y, 0.0, 0.0
    split = r / b if b else None  # where nu b - r changes sign

    def nearest(nu, active):
        """The projection of nu >= 0 to where nu b - r is positive, or is not."""
        if split is None:
            return max(nu, 0.0) if (r < 0) == active else None
        above = active == (b > 0)  # the set is nu >= split, or nu <= split
        if not above and split < 0:
            return None
        return max(nu, split, 0.0) if above else min(max(nu, 0.0), split)

    def active_value(nu):
        return (r * r / u - q) / (2 * nu) + nu / 2 * (b * b / u - bound) - r * b / u

    def free_value(nu):
        return -(q / nu + nu * bound) / 2

    rest = max(q - r * r / u, 0.0) / max(bound - b * b / u, 0.0) if b * b / u < bound else 0.0
    candidates = []
    nu = nearest(rest**0.5, True)
    if nu:
        candidates.append((active_value(nu), nu))
    nu = nearest((q / bound) ** 0.5, False)
    if nu:
        candidates.append((free_value(nu), nu))
    nu = max(candidates)[1]
    mu = max(0.0, (nu * b - r) / u)
    return -(x + mu * y) / nu, nu, mu


def constrained_minimum(H, g, delta, a, b):
    """The least g's for s'Hs / 2 <= delta, b + a s <= 0, over every active set; None if empty."""
    L = torch.linalg.cholesky(H)
    c = torch.linalg.solve_triangular(L, g.unsqueeze(1), upper=False).squeeze(1)
    B = torch.linalg.solve_triangular(L, a.T, upper=False).T
    radius, values = (2 * delta) ** 0.5, []
    room = 1e-9 * (b.abs() + radius * B.norm(dim=1))
    for size in range(len(b) + 1):
        for active in map(list, itertools.combinations(range(len(b)), size)):
            inverse = torch.linalg.pinv(B[active])
            foot, flat = -inverse @ b[active], c - inverse @ (B[active] @ c)
            candidates = [foot]
            if flat.norm() > 1e-9 * c.norm():
                rest = (radius**2 - foot @ foot).clamp(min=0).sqrt()
                candidates.append(foot - rest * flat / flat.norm())
            values += [
                (c @ y).item()
                for y in candidates
                if y.norm() <= radius * (1 + 1e-9) and (b + B @ y <= room).all()
            ]
    return min(values, default=None)


def trust_region(A: Tensor, g: Tensor, radius: float) -> Tensor:
    """The minimiser of g's + s'As/2 in the ball, by bisection on the multiplier (float64)."""
    theta, V = torch.linalg.eigh(A)
    identity = torch.eye(len(g), dtype=g.dtype)
    if not g.any():
        return torch.zeros_like(g) if theta[0] >= 0 else radius * V[:, 0]

    def step(multiplier):
        return torch.linalg.solve(A + multiplier * identity, -g)

    size = theta.abs().max().item() + g.norm().item() / radius
    if theta[0] > 1e-13 * size and step(0.0).norm() <= radius:
        return step(0.0)
    low = max(0.0, -theta[0].item())
    high = low + 2 * size
    barely = low + 1e-13 * size
    if step(barely).norm() < radius:  # the hard case: the rest of the way along an eigenvector
        s = torch.linalg.pinv(A + low * identity, rtol=1e-10, hermitian=True) @ -g
        if theta[0] >= -1e-13 * size:
            return s
        v = V[:, 0]
        along = (s @ v).item()
        room = radius**2 - (s @ s).item()
        return s + (-along + (along**2 + max(room, 0.0)) ** 0.5) * v
    low = barely
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if step(middle).norm() > radius else (low, middle)
    return step(high)
