"""The critic, and ways to regress it on returns."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

from trustregion import NaturalTrustRegion

from .config import Config
from .networks.squared_error import squared_error
from .undo import Undo


class CriticFit(abc.ABC):
    """A way to regress a critic on returns, made of a critic, what to fit of it, and options.

    Attributes:
        optimizer: whose state a checkpoint keeps.

    """

    def __init__(
        self,
        critic: nn.Module,
        parameters: list[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        config: Config,
    ) -> None:
        self.critic, self.parameters, self.optimizer = critic, parameters, optimizer
        self.config = config

    @abc.abstractmethod
    def fit(self, rows: Tensor, returns: Tensor, generator: torch.Generator) -> float:
        """Fit the critic.

        Args:
            rows: of observations, ``(B, d)``.
            returns: targets, ``(B,)``.
            generator: source of the shuffles.

        Returns:
            The mean squared error of the values.

        Raises:
            ValueError: the error became NaN or infinite; the weights are those before.

        """

    def error(self, rows: Tensor, returns: Tensor) -> Tensor:
        """Return the mean squared error."""
        return (self.critic(rows) - returns).square().mean()


class AdamFit(CriticFit):
    """Epochs of shuffled minibatches. The error is the mean over the last epoch, as it went."""

    def __init__(self, critic: nn.Module, parameters: list[nn.Parameter], config: Config) -> None:
        adam = torch.optim.Adam(parameters, lr=config.critic_lr, fused=True)
        super().__init__(critic, parameters, adam, config)

    def fit(self, rows: Tensor, returns: Tensor, generator: torch.Generator) -> float:
        """Run the epochs."""
        undo = Undo(self.parameters, self.optimizer)
        error = squared_error(self.critic, self.parameters, rows, returns)
        total = 0.0
        for epoch in range(self.config.critic_epochs):
            total = 0.0
            order = torch.randperm(len(returns), generator=generator)
            for positions in order.split(self.config.critic_batch_size):
                value = error(positions)
                if not math.isfinite(value):
                    undo()
                    raise ValueError(
                        f"the critic's loss is {value} in pass {epoch}: it diverged. Lower"
                        " critic_lr, or scale the rewards"
                    )
                self.optimizer.step()
                total += value * len(positions)
        return total / len(returns)


class TrustRegionFit(CriticFit):
    r"""Steps within a KL ball, on the full batch.

    The values are the means of normals whose variance is the error before the fit, so that each
    step is bounded by :math:`E[(V - V_{old})^2] / (2 \sigma^2) \le \delta`: the trust region of
    Schulman et al., Generalized Advantage Estimation, 2016, section 5, by the optimizer of this
    project. The Fisher matrix of these normals is the Gauss-Newton matrix of the error.
    """

    def __init__(self, critic: nn.Module, parameters: list[nn.Parameter], config: Config) -> None:
        self._region = NaturalTrustRegion(
            parameters,
            config.critic_delta,
            damping=config.critic_damping,
            cg_max_iter=config.critic_cg_max_iter,
        )
        super().__init__(critic, parameters, self._region, config)

    def fit(self, rows: Tensor, returns: Tensor, generator: torch.Generator) -> float:  # noqa: ARG002 # it shuffles nothing
        """Take the steps; fewer where one is rejected."""
        with torch.no_grad():
            error = self.error(rows, returns).item()
        if not math.isfinite(error):
            raise ValueError(f"the critic's loss is {error}: the returns or values are not finite")
        if error == 0:
            return 0.0
        sigma = torch.full_like(returns, math.sqrt(error))

        def closure() -> tuple[Tensor, Distribution]:
            values = self.critic(rows)
            return ((values - returns) / sigma).square().mean(), Normal(values, sigma)

        reached = 1.0  # of the error
        for _ in range(self.config.critic_steps):
            self._region.step(closure)
            info = self._region.info
            assert info is not None  # after a step
            if not info.accepted:
                break
            reached = info.new_loss
        return reached * error


class LBFGSFit(CriticFit):
    """One call of L-BFGS on the full batch, from a memory that starts empty."""

    def __init__(self, critic: nn.Module, parameters: list[nn.Parameter], config: Config) -> None:
        self._lbfgs = torch.optim.LBFGS(
            parameters,
            max_iter=config.critic_steps,
            history_size=config.critic_steps,
            line_search_fn="strong_wolfe",
        )
        super().__init__(critic, parameters, self._lbfgs, config)

    def fit(self, rows: Tensor, returns: Tensor, generator: torch.Generator) -> float:  # noqa: ARG002 # it shuffles nothing
        """Run the iterations; put the weights back where they end in a worse error."""
        undo, everywhere = Undo(self.parameters), torch.arange(len(returns))
        error = squared_error(self.critic, self.parameters, rows, returns)
        try:
            first = self._lbfgs.step(lambda: error(everywhere))
        except BaseException:  # amid a line search
            undo()
            raise
        finally:
            self._lbfgs.state.clear()  # the curvature is that of this batch
        last = error(everywhere)
        if not (math.isfinite(first) and last <= first):
            undo()
        if not math.isfinite(first):
            raise ValueError(f"the critic's loss is {first}: the returns or values are not finite")
        return min(first, last)


FITS: dict[str, Callable[[nn.Module, list[nn.Parameter], Config], CriticFit]] = {
    "adam": AdamFit,
    "trust_region": TrustRegionFit,
    "lbfgs": LBFGSFit,
}


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns); NaN where the returns do not vary."""
    total = returns.var(correction=0)
    if total == 0:
        return math.nan
    return (1 - (returns - values).var(correction=0) / total).item()
