"""The options of an algorithm, as one frozen record."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from numbers import Integral
from typing import Any, Literal, Self, TypeAlias, get_args

import torch

from .envs.make import Vectorization

AdvantageName: TypeAlias = Literal["gae", "n_step", "monte_carlo"]
CriticFitName: TypeAlias = Literal["adam", "trust_region", "lbfgs"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options every algorithm has."""

    seed: int = 0
    """Seed of weights, actions and environments; torch's global random state is not used."""

    n_envs: int = 8
    """Number of copies of the environment."""

    device: str = "cpu"
    """Where networks and updates are: cpu, cuda, ...; the environments stay on the CPU."""

    steps_per_update: int = 2048
    """Environment steps an update, over all copies."""

    vectorization: Vectorization = "auto"
    """How copies of the environment are stepped: see make_envs."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and critic."""

    shared_encoder: bool = False
    """Policy and critic share all layers but the last."""

    squash_actions: bool = False
    """Squash Box actions by tanh instead of clipping them."""

    state_dependent_std: bool = False
    """Let the policy's network give the standard deviations of Box actions."""

    normalise_observations: bool = False
    """Observations in units of their running spread."""

    normalise_rewards: bool = False
    """Rewards in units of the running spread of their discounted sums."""

    gamma: float = 0.99
    """Discount."""

    advantages: AdvantageName = "gae"
    """Advantage estimates."""

    gae_lambda: float = 0.98
    """Trace decay of gae."""

    n_step: int = 5
    """Rewards of n_step."""

    td_lambda: float | None = None
    """Trace decay of the returns that the critic is fitted to; by default they are values plus
    advantages."""

    critic_fit: CriticFitName = "adam"
    """How the critic is fitted."""

    critic_lr: float = 1e-3
    """Learning rate of the critic's Adam."""

    critic_epochs: int = 10
    """Passes over the rollout of the critic's Adam."""

    critic_batch_size: int = 128
    """Minibatch size of the critic's Adam."""

    critic_steps: int = 20
    """Trust-region steps, or iterations of L-BFGS."""

    critic_delta: float = 0.1
    """KL radius of a trust-region step: E[(V - V_old)^2] over twice the error before the fit."""

    critic_damping: float = 1e-3
    """Tikhonov term of a trust-region step."""

    critic_cg_max_iter: int = 10
    """Limit on the conjugate-gradient iterations of a trust-region step."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_counts(
            "n_envs",
            "steps_per_update",
            "n_step",
            "critic_epochs",
            "critic_batch_size",
            "critic_steps",
            "critic_cg_max_iter",
        )
        for name in ("gamma", "gae_lambda", "td_lambda"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        for name, kind in (
            ("advantages", AdvantageName),
            ("vectorization", Vectorization),
            ("critic_fit", CriticFitName),
        ):
            value, choices = getattr(self, name), get_args(kind)
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        self.check_positive("critic_lr", "critic_delta")
        self.check_not_negative("critic_damping")
        if not isinstance(self.seed, Integral):
            raise ValueError(f"seed must be a whole number, got {self.seed!r}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        widths = self.hidden if isinstance(self.hidden, tuple) else (0,)
        if not all(isinstance(width, Integral) and width > 0 for width in widths):
            raise ValueError(
                f"hidden must be widths of at least 1, such as (64, 64), got {self.hidden!r}"
            )

    def check_device(self) -> None:
        """Raise a ValueError unless the device can be computed on."""
        try:
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"cannot compute on device={self.device!r}: {reason}; take another, such as 'cpu'"
            ) from error

    def check_counts(self, *names: str) -> None:
        """Raise a ValueError where one of the options is not a whole number from 1 on."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Integral):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def check_not_negative(self, *names: str) -> None:
        """Raise a ValueError where one of the options is neither None nor finite and at least 0."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")

    def check_positive(self, *names: str) -> None:
        """Raise a ValueError where one of the options is neither None nor positive and finite."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive, finite number, got {value}")

    def check_batch(self) -> None:
        """Raise a ValueError unless an update is some whole steps of each environment."""
        rows, rest = divmod(self.steps_per_update, self.n_envs)
        if rest:
            near = sorted({max(2, rows) * self.n_envs, max(2, rows + 1) * self.n_envs})
            raise ValueError(
                f"steps_per_update={self.steps_per_update} does not divide by {self.n_envs}"
                f" environments: try {' or '.join(map(str, near))}"
            )
        if rows < 2:  # one step an environment can be all resets
            raise ValueError(
                f"steps_per_update={self.steps_per_update} is too few for {self.n_envs}"
                f" environments: at least {2 * self.n_envs} are needed"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """Return the config of options read from a file.

        Raises:
            ValueError: an option this version does not know.

        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                hint = f": did you mean {near[0]!r}?" if near else f". There are {', '.join(known)}"
                raise ValueError(f"{cls.__name__} has no option {name!r}{hint}")
        lists = {key: tuple(v) for key, v in options.items() if isinstance(v, list)}
        return cls(**{**options, **lists})


@dataclass(frozen=True, kw_only=True)
class NaturalConfig(Config):
    """Options of the algorithms that solve for a natural gradient."""

    damping: float = 0.1
    """Tikhonov term of the natural-gradient solve."""

    cg_max_iter: int = 10
    """Limit on conjugate-gradient iterations."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        self.check_not_negative("damping")
        self.check_counts("cg_max_iter")
