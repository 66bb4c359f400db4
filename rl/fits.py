"""Ways to regress a critic on returns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from trustregion import NaturalTrustRegion
from trustregion.operators import ParameterVector

from .networks.modes import evaluating
from .networks.numpy_twin import adam_step, squared_error
from .options import check_counts, check_not_negative, check_positive, convert_fields
from .undo import undone_on_error


class Regression(NamedTuple):
    """A critic and what it is to predict.

    Attributes:
        critic: rows ``(B, d)`` to values ``(B,)``.
        parameters: those that are fitted.
        rows: of observations, ``(B, d)``.
        returns: targets, ``(B,)``.
        generator: source of random numbers.

    """

    critic: nn.Module
    parameters: list[nn.Parameter]
    rows: Tensor
    returns: Tensor
    generator: torch.Generator


class CriticFit(Protocol):
    """How a critic is regressed on returns: options, and no state of its own.

    What has to last from one update to the next, such as the moments of Adam, is in an optimizer
    that the agent keeps and saves.
    """

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer for the parameters of a critic that are to be fitted."""
        ...

    def __call__(self, task: Regression, optimizer: torch.optim.Optimizer) -> float:
        """Fit the critic and return the mean squared error of the values.

        If this raises or is interrupted, the critic and the optimizer are as before.

        Raises:
            ValueError: the error became NaN or infinite.

        """
        ...


@dataclass(frozen=True)
class AdamFit:
    """Passes of shuffled minibatches by Adam. The error is the mean over the last pass, as it went.

    Attributes:
        lr: learning rate.
        epochs: passes over the rollout.
        batch_size: size of a minibatch; the last one of a pass may be smaller.

    """

    lr: float = 2e-3
    epochs: int = 5
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Check the ranges."""
        convert_fields(self)
        check_positive(self, "lr")
        check_counts(self, "epochs", "batch_size")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return Adam over one flat copy: a step takes half the time of one over the list."""
        return torch.optim.Adam([_flat(parameters)], lr=self.lr, fused=True)

    def __call__(self, task: Regression, optimizer: torch.optim.Optimizer) -> float:
        """Make the passes."""
        assert isinstance(optimizer, torch.optim.Adam)  # made above
        vector, (x,) = ParameterVector(task.parameters), optimizer.param_groups[0]["params"]
        start, frozen, n = vector.values(), _frozen(task.parameters), len(task.returns)
        x.data.copy_(start)
        inputs, error = squared_error(task.critic, x, task.parameters, task.rows)
        total, step = 0.0, adam_step(optimizer, x)
        with undone_on_error(task.critic, optimizers=[optimizer]):
            for epoch in range(self.epochs):
                total = 0.0
                order = torch.randperm(n, generator=task.generator)
                parts = inputs[order], task.returns[order]
                for batch in zip(*(part.split(self.batch_size) for part in parts), strict=True):
                    value = error(*batch)
                    if not math.isfinite(value):
                        raise ValueError(
                            f"the critic's loss is {value} in pass {epoch}: it diverged. Lower lr"
                            " of critic_fit, or scale the rewards"
                        )
                    step()
                    if frozen is not None:
                        x.data[frozen] = start[frozen]
                    total += value * len(batch[1])
            vector.assign(x.detach())
        return total / n


@dataclass(frozen=True)
class LBFGSFit:
    """L-BFGS with a strong Wolfe line search on the full batch, from a memory that starts empty.

    Attributes:
        steps: iterations, and pairs in the memory.

    """

    steps: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        convert_fields(self)
        check_counts(self, "steps")

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return L-BFGS over one flat copy."""
        return torch.optim.LBFGS(
            [_flat(parameters)],
            max_iter=self.steps,
            history_size=self.steps,
            line_search_fn="strong_wolfe",
        )

    def __call__(self, task: Regression, optimizer: torch.optim.Optimizer) -> float:
        """Run the iterations; keep the parameters if they end in a worse error."""
        vector, (x,) = ParameterVector(task.parameters), optimizer.param_groups[0]["params"]
        x.data.copy_(vector.values())
        inputs, error = squared_error(task.critic, x, task.parameters, task.rows)
        frozen = _frozen(task.parameters)

        def closure() -> float:
            value = error(inputs, task.returns)
            if frozen is not None:
                x.grad[frozen] = 0.0
            return value

        with undone_on_error(task.critic):
            try:
                first = float(optimizer.step(closure))
                if not math.isfinite(first):
                    raise ValueError(
                        f"the critic's loss is {first}: the returns or values are not finite"
                    )
                last = error(inputs, task.returns)
            finally:
                optimizer.state.clear()  # the curvature is that of this batch
            if last <= first:
                vector.assign(x.detach())
        return min(first, last)


@dataclass(frozen=True)
class TrustRegionFit:
    r"""Steps within a KL ball on the full batch.

    The values are the means of normals whose variance is the error before the fit, so that each
    step is bounded by :math:`E[(V - V_{old})^2] / (2 \sigma^2) \le \delta`: the trust region of
    Schulman et al., Generalized Advantage Estimation, 2016, section 5, by the optimizer of this
    project. The Fisher matrix of these normals is the Gauss-Newton matrix of the error.

    Attributes:
        steps: at most; fewer where one is rejected.
        delta: KL radius of a step.
        damping: Tikhonov term of a step.
        cg_max_iter: limit on the conjugate-gradient iterations of a step.

    """

    steps: int = 20
    delta: float = 0.1
    damping: float = 1e-3
    cg_max_iter: int = 10

    def __post_init__(self) -> None:
        """Check the ranges."""
        convert_fields(self)
        check_counts(self, "steps", "cg_max_iter")
        check_positive(self, "delta")
        check_not_negative(self, "damping")

    def optimizer(self, parameters: list[nn.Parameter]) -> NaturalTrustRegion:
        """Return the trust region."""
        return NaturalTrustRegion(
            parameters,
            self.delta,
            damping=self.damping,
            cg_max_iter=self.cg_max_iter,
            process_group=False,
        )

    def __call__(self, task: Regression, optimizer: torch.optim.Optimizer) -> float:
        """Take the steps."""
        assert isinstance(optimizer, NaturalTrustRegion)  # made above
        critic, _, rows, returns, _ = task
        with torch.no_grad(), evaluating(critic):
            error = (critic(rows) - returns).square().mean().item()
        if not math.isfinite(error):
            raise ValueError(f"the critic's loss is {error}: the returns or values are not finite")
        if error == 0:
            return 0.0
        sigma = torch.full_like(returns, math.sqrt(error))

        def closure() -> tuple[Tensor, Distribution]:
            values = critic(rows)
            return ((values - returns) / sigma).square().mean(), Normal(values, sigma)

        reached = 1.0  # of the error
        with undone_on_error(critic, optimizers=[optimizer]):
            for _ in range(self.steps):
                optimizer.step(closure)
                info = optimizer.info
                assert info is not None  # after a step
                if not info.accepted:
                    break
                reached = info.new_loss
        return reached * error


FITS: dict[str, type[AdamFit | LBFGSFit | TrustRegionFit]] = {
    "adam": AdamFit,
    "lbfgs": LBFGSFit,
    "trust_region": TrustRegionFit,
}


def _flat(parameters: list[nn.Parameter]) -> nn.Parameter:
    return nn.Parameter(ParameterVector(parameters).values().detach().clone())


def _frozen(parameters: list[nn.Parameter]) -> Tensor | None:
    """Return which entries of the flat copy require no gradient since then; None for none."""
    entries = torch.cat([torch.full((p.numel(),), not p.requires_grad) for p in parameters])
    return entries.to(parameters[0].device) if bool(entries.any()) else None


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    total = returns.var(correction=0)
    if total == 0:
        return math.nan
    return (1 - (returns - values).var(correction=0) / total).item()
