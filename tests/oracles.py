"""Slow and obviously right versions of what the package computes, never copies of it."""

from __future__ import annotations

import decimal
import fractions
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


def n_step_returns(rewards, next_values, terminated, truncated, gamma, n):
    """Rewards of n steps, or up to the end of episode or rollout, and the value after them."""
    T, N = rewards.shape
    returns = torch.zeros_like(rewards)
    for i in range(N):
        for t in range(T):
            last = min(t + n, T) - 1
            for k in range(t, last + 1):
                returns[t, i] += gamma ** (k - t) * rewards[k, i]
                if terminated[k, i] or truncated[k, i] or k == last:
                    future = 0.0 if terminated[k, i] else next_values[k, i]
                    returns[t, i] += gamma ** (k - t + 1) * future
                    break
    return returns


def lambda_returns(rewards, next_values, terminated, truncated, gamma, trace):
    """Returns by Sutton and Barto's mixture (12.3): (1 - trace) trace^(n-1) of the n-step return,
    and what is left of the weights on the longest one."""
    T, N = rewards.shape
    each = [
        n_step_returns(rewards, next_values, terminated, truncated, gamma, n + 1) for n in range(T)
    ]
    returns = torch.zeros_like(rewards)
    for i in range(N):
        for t in range(T):
            done = terminated[t:, i] | truncated[t:, i]
            steps = int(done.nonzero()[0]) + 1 if done.any() else T - t
            for n in range(1, steps):
                returns[t, i] += (1 - trace) * trace ** (n - 1) * each[n - 1][t, i]
            returns[t, i] += trace ** (steps - 1) * each[steps - 1][t, i]
    return returns


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


def batch_jacobian(predict, params) -> Tensor:
    """Dense Jacobian of all outputs, a tensor or a tuple, flattened one after the other."""

    def outputs(v):
        ys = predict(unflatten(v, params))
        return flatten([ys] if isinstance(ys, Tensor) else ys)

    theta = flatten([p.detach() for p in params])
    return torch.autograd.functional.jacobian(outputs, theta)


def gauss_newton(predict, loss, params) -> Tensor:
    """Dense J' H J with the Jacobian of the outputs and the Hessian of ``loss`` in them."""
    ys = predict([p.detach() for p in params])
    single = isinstance(ys, Tensor)
    like = [ys] if single else ys

    def of_outputs(u):
        parts = unflatten(u, like)
        return loss(parts[0] if single else parts)

    J = batch_jacobian(predict, params)
    H = torch.autograd.functional.hessian(of_outputs, flatten(like).detach())
    return J.T @ H @ J


def loss_hessian(loss, params) -> Tensor:
    """Dense Hessian of a scalar function of a list of parameters."""
    theta = flatten([p.detach() for p in params])
    return torch.autograd.functional.hessian(lambda v: loss(unflatten(v, params)), theta)


def score_outer(log_probs, params) -> Tensor:
    """Dense mean of g g' over all entries of a tensor of log-probabilities."""
    J = batch_jacobian(lambda p: log_probs(p).reshape(-1), params)
    return sum(g.outer(g) for g in J) / len(J)


def kronecker_factors(layers, family, x) -> list[tuple[Tensor, Tensor]]:
    """(A, G) of each linear layer of a list of layers, sample by sample and position by position.

    ``family`` makes the distribution of one sample of what the last layer returns. ``A`` is the
    mean of a a' (with a 1 behind a for a bias) over samples and positions, ``G`` the mean over
    samples of the sum over positions of J'MJ: J the Jacobian at the layer's output, M the Hessian
    of torch's KL.
    """

    def run(sample, shifts=None, inputs=None):
        shifts = dict(shifts or {})
        for i, layer in enumerate(layers):
            if inputs is not None:
                inputs[i] = sample
            sample = layer(sample)
            if i in shifts:
                sample = sample + shifts[i]
        return sample

    found = []
    for i, layer in enumerate(layers):
        if not isinstance(layer, torch.nn.Linear):
            continue
        A, G, rows = 0.0, 0.0, 0
        for sample in x:
            inputs = {}
            y = run(sample, inputs=inputs).detach()
            for a in inputs[i].detach().reshape(-1, layer.in_features):
                if layer.bias is not None:
                    a = torch.cat([a, torch.ones_like(a[:1])])
                A, rows = A + torch.outer(a, a), rows + 1
            old = family(y)
            M = torch.autograd.functional.hessian(
                lambda z, old=old: td.kl_divergence(old, family(z)).sum(), y
            )
            shift = torch.zeros_like(layer(inputs[i])).detach()
            J = torch.autograd.functional.jacobian(lambda s, x=sample, i=i: run(x, {i: s}), shift)
            J = J.reshape(y.numel(), -1, layer.out_features)
            M = M.reshape(y.numel(), y.numel())
            G = G + torch.einsum("atj,ab,btk->jk", J, M, J)
        found.append((A / rows, G / len(x)))
    return found


def _double_exponential(kind: str, step: float = 1 / 64, reach: float = 4.0):
    """Nodes and weights of the double exponential rule over a line, half line or interval."""
    t = torch.arange(-reach, reach + step, step, dtype=torch.float64)
    u, du = torch.pi / 2 * t.sinh(), torch.pi / 2 * t.cosh()
    if kind == "real":
        return u.sinh(), step * u.cosh() * du
    if kind == "positive":
        return u.exp(), step * u.exp() * du
    return torch.sigmoid(2 * u), step * 2 * du * torch.sigmoid(2 * u) * torch.sigmoid(-2 * u)


def _hermite(dims: int, nodes: int = 6):
    """Outcomes and probabilities that integrate polynomials exactly over standard normals."""
    off = torch.arange(1, nodes, dtype=torch.float64).sqrt()
    x, vectors = torch.linalg.eigh(off.diag(1) + off.diag(-1))  # Golub and Welsch
    w = vectors[0].square()
    z = torch.cartesian_prod(*[x] * dims).reshape(-1, dims)
    return z, torch.cartesian_prod(*[w] * dims).reshape(-1, dims).prod(1)


def outcomes(distribution, kind: str) -> tuple[Tensor, Tensor]:
    """Outcomes of a distribution with batch shape (1,) and weights that sum expectations.

    All of a finite support, counts far out, or nodes of a quadrature.
    """
    if kind == "finite":
        y = distribution.enumerate_support()
        return y, distribution.log_prob(y).exp().reshape(-1)
    if kind == "count":
        y = torch.arange(4000, dtype=torch.float64).unsqueeze(1)
        return y, distribution.log_prob(y).exp().reshape(-1)
    if kind == "sum":  # of one-hot vectors
        n, k = distribution.total_count, distribution.logits.shape[-1]
        rows = [c for c in itertools.product(range(n + 1), repeat=k) if sum(c) == n]
        y = torch.tensor(rows, dtype=torch.float64).unsqueeze(1)
        return y, distribution.log_prob(y).exp().reshape(-1)
    if kind == "gaussian":  # by its own reparameterisation
        base, transforms = distribution, []
        while hasattr(base, "base_dist"):
            transforms = getattr(base, "transforms", []) + transforms
            base = base.base_dist
        loc = base.loc.reshape(1, -1)
        z, w = _hermite(loc.shape[1])
        root = base.scale_tril[0] if hasattr(base, "scale_tril") else base.scale.reshape(-1).diag()
        y = (loc + z @ root.mT).reshape(-1, *base.loc.shape)
        for transform in transforms:
            y = transform(y)
        return y, w
    if kind == "simplex":  # by sticks
        u, w = _double_exponential("unit", step=1 / 12, reach=3.2)
        u, w = torch.cartesian_prod(u, u), torch.cartesian_prod(w, w).prod(1)
        y = torch.stack([u[:, 0], (1 - u[:, 0]) * u[:, 1], (1 - u[:, 0]) * (1 - u[:, 1])], 1)
        w, y = w * (1 - u[:, 0]), y.unsqueeze(1)
    else:
        y, w = _double_exponential(kind)
        y = y.unsqueeze(1)
    w = w * distribution.log_prob(y).exp().reshape(-1)
    inside = (w > 0) & w.isfinite()  # not rounded to the rim
    return y[inside], w[inside]


def expected_kl(old, new, kind: str) -> float:
    """KL(old || new) of distributions with batch shape (1,), by its definition."""
    y, w = outcomes(old, kind)
    some = w > 0
    return (w * (old.log_prob(y) - new.log_prob(y)).reshape(-1))[some].sum().item()


def expected_score_covariance(build, x: Tensor, kind: str) -> Tensor:
    """E score score' in ``x`` of shape (k,), for ``build``: (S, k) -> distributions of batch S."""
    y, w = outcomes(build(x.unsqueeze(0)), kind)
    rows = x.expand(len(w), -1).clone().requires_grad_()
    (scores,) = torch.autograd.grad(build(rows).log_prob(y.squeeze(1)).sum(), rows)
    return torch.einsum("s,si,sj->ij", w, scores, scores)


def exact_log_gap(t: float) -> float:
    """``t - log(1 + t)`` by 60-digit arithmetic."""
    with decimal.localcontext(prec=60):
        x = decimal.Decimal(t)
        return float(x - (1 + x).ln())


def exact_exp_gap(x: float) -> float:
    """``exp(x) - 1 - x`` by 60-digit arithmetic."""
    with decimal.localcontext(prec=60):
        return float(decimal.Decimal(x).exp() - 1 - decimal.Decimal(x))


def exact_stirling_gap(x0: float, x1: float) -> float:
    """The gap of ``lgamma(x) - x log x + x`` above its tangent, by 60-digit arithmetic.

    lgamma and digamma are Stirling's series above 200, less the terms of the recurrence.
    """
    with decimal.localcontext(prec=60):
        a, b = decimal.Decimal(x0), decimal.Decimal(x1)
        pairs = [_stirling_remainder(x) for x in (a, b)]
        return float(pairs[1][0] - pairs[0][0] - pairs[0][1] * (b - a))


def _stirling_remainder(x: decimal.Decimal):
    """``lgamma(x) - x log x + x`` less a constant, and its derivative."""
    y, value, slope = x, decimal.Decimal(0), decimal.Decimal(0)
    while y < 200:
        value, slope, y = value - y.ln(), slope - 1 / y, y + 1
    value += (y - decimal.Decimal(1) / 2) * y.ln() - y
    slope += y.ln() - 1 / (2 * y)
    for j in range(1, 12):
        B = decimal.Decimal(_BERNOULLI[j - 1].numerator) / _BERNOULLI[j - 1].denominator
        value += B / (2 * j * (2 * j - 1)) / y ** (2 * j - 1)
        slope -= B / (2 * j) / y ** (2 * j)
    return value - x * x.ln() + x, slope - x.ln()


_BERNOULLI = [
    fractions.Fraction(*pair)
    for pair in [
        (1, 6),
        (-1, 30),
        (1, 42),
        (-1, 30),
        (5, 66),
        (-691, 2730),
        (7, 6),
        (-3617, 510),
        (43867, 798),
        (-174611, 330),
        (854513, 138),
    ]
]
