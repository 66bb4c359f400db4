"""The options of an algorithm, as one frozen record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
import torch

from .envs.copies import OnError
from .envs.make import Vectorization
from .experience.advantages import ADVANTAGES, Advantages
from .fits import FITS, CriticFit
from .networks.encoders import Activation
from .options import (
    check_counts,
    check_fractions,
    check_not_negative,
    check_positive,
    convert_fields,
    record_from_text,
    record_to_text,
)

# names of other libraries, and what they are called here
_ELSEWHERE = {
    "n_steps": "steps_per_update, which counts the steps of all environments: n_steps * n_envs",
    "learning_rate": "lr of PPO, policy_lr of VPG, and critic_fit=AdamFit(lr=...)",
    "target_kl": "delta of TRPO, kl_limit of PPO; joint over action dimensions",
    "cg_max_steps": "cg_max_iter",
    "cg_damping": "damping; joint over action dimensions",
    "n_critic_updates": "critic_fit=AdamFit(epochs=...)",
    "n_epochs": "epochs of PPO",
    "clip_range": "clip",
    "ent_coef": "entropy_coef",
    "vf_coef": "value_coef",
    "policy_kwargs": "hidden, critic_hidden, activation, shared_encoder, state_dependent_std",
    "net_arch": "hidden and critic_hidden",
    "activation_fn": "activation",
    "verbose": "learn(progress=True, callback=Table())",
    "tensorboard_log": "learn(callback=TensorBoardLog(folder))",
    "normalize_advantage": "nothing: advantages are always normalised",
    "n_step": "advantages=NStep(n)",
    "critic_lr": "critic_fit=AdamFit(lr=...)",
    "critic_epochs": "critic_fit=AdamFit(epochs=...)",
    "critic_batch_size": "critic_fit=AdamFit(batch_size=...)",
    "critic_steps": "critic_fit=LBFGSFit(steps=...) or TrustRegionFit(steps=...)",
    "critic_delta": "critic_fit=TrustRegionFit(delta=...)",
    "critic_damping": "critic_fit=TrustRegionFit(damping=...)",
    "critic_cg_max_iter": "critic_fit=TrustRegionFit(cg_max_iter=...)",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that every algorithm has."""

    seed: int | None = 0
    """Seed of weights, actions and environments; None to draw one."""

    n_envs: int = 8
    """Number of copies of the environment."""

    device: str = "cpu"
    """Device of networks and updates: cpu, cuda, ... or auto. Environments stay on the CPU."""

    steps_per_update: int = 2048
    """Environment steps per update, over all copies."""

    vectorization: Vectorization = "auto"
    """How copies of the environment are stepped: see make_envs."""

    env_timeout: float | None = 60.0
    """Seconds that a copy in a process of its own has for an answer; None to wait."""

    on_env_error: OnError = "raise"
    """What to do where an environment fails: raise, or restart it and go on: see make_envs."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of policy and critic."""

    critic_hidden: tuple[int, ...] | None = None
    """The same for the critic, if it is to differ."""

    activation: Activation = "tanh"
    """Nonlinearity of the hidden layers."""

    shared_encoder: bool = False
    """Policy and critic share all layers but the last."""

    squash_actions: bool = False
    """Squash Box actions by tanh instead of clipping them."""

    state_dependent_std: bool = False
    """Let the policy's network give the standard deviations of Box actions."""

    normalise_observations: bool = False
    """Give the networks observations in units of their running spread."""

    normalise_rewards: bool = False
    """Learn from rewards in units of the running spread of their discounted sums."""

    gamma: float = 0.99
    """Discount."""

    gae_lambda: float = 0.98
    """Trace decay of the advantage estimator gae."""

    advantages: Advantages | str = "gae"
    """Advantage estimator; in Python also GAE(0.98), NStep(5), ... or a function of your own."""

    td_lambda: float | None = None
    """Trace decay of the critic's targets; by default they are values plus advantages."""

    critic_fit: CriticFit | str = "adam"
    """How the critic is fitted; in Python also AdamFit(lr=1e-3), ... or an object of your own."""

    def __post_init__(self) -> None:
        """Convert and check the values."""
        convert_fields(self)
        check_counts(self, "n_envs", "steps_per_update")
        check_fractions(self, "gamma", "gae_lambda", "td_lambda")
        if self.seed is None:
            object.__setattr__(self, "seed", int(np.random.SeedSequence().generate_state(1)[0]))
        check_not_negative(self, "seed")
        if self.seed is not None and self.seed >= 2**64:
            raise ValueError(f"seed must be less than 2**64, got {self.seed}")
        check_positive(self, "env_timeout")
        for name in ("hidden", "critic_hidden"):
            widths = getattr(self, name)
            if widths is not None and not all(width > 0 for width in widths):
                raise ValueError(
                    f"{name} must be widths of at least 1, such as (64, 64), got {widths!r}"
                )
        if self.device == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            object.__setattr__(self, "device", "cpu" if found is None else found.type)
        own: tuple[tuple[str, Mapping[str, type[Any]], dict[str, Any]], ...] = (
            ("advantages", ADVANTAGES, {"gae_lambda": self.gae_lambda}),
            ("critic_fit", FITS, {}),
        )
        for name, kinds, defaults in own:
            value = getattr(self, name)
            if isinstance(value, str):
                value = record_from_text(name, value, kinds, **defaults)
            elif not callable(value) or isinstance(value, type):
                raise ValueError(
                    f"{name} must be one of {', '.join(kinds)}, an object such as"
                    f" {next(iter(kinds.values())).__name__}(), or a callable of your own, got"
                    f" {value!r}"
                )
            object.__setattr__(self, name, value)

    def check_device(self) -> None:
        """Raise a ValueError unless the device can be computed on."""
        try:
            torch.ones(1, device=self.device).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(
                f"cannot compute on device={self.device!r}: {reason}; take another, such as 'cpu'"
            ) from error

    def check_batch(self) -> None:
        """Raise a ValueError unless an update is a number of whole steps of each environment."""
        rows, rest = divmod(self.steps_per_update, self.n_envs)
        if rest:
            near = sorted({max(2, rows) * self.n_envs, max(2, rows + 1) * self.n_envs})
            raise ValueError(
                f"steps_per_update={self.steps_per_update} does not divide by {self.n_envs}"
                f" environments: try {' or '.join(map(str, near))}"
            )
        if rows < 2:  # one step per environment can be all resets
            raise ValueError(
                f"steps_per_update={self.steps_per_update} is too few for {self.n_envs}"
                f" environments: at least {2 * self.n_envs} are needed"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; objects of your own as the names of their types."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, kinds in (("advantages", ADVANTAGES), ("critic_fit", FITS)):
            text = record_to_text(values[name], kinds)
            values[name] = _OWN + _name(values[name]) if text is None else text
        return values

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> Self:
        """Return the config of options, perhaps read from a file.

        Raises:
            ValueError: an option that this version does not know, or one that was an object.

        """
        known = [field.name for field in fields(cls)]
        for name, value in options.items():
            if name not in known:
                raise ValueError(f"{cls.__name__} has no option {name!r}{_hint(name, known)}")
            if isinstance(value, str) and value.startswith(_OWN):
                raise ValueError(
                    f"{name} was an object of your own, {value.removeprefix(_OWN)}, which a file"
                    f" cannot hold: pass {name}="
                )
        return cls(**options)


_OWN = "own:"


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__qualname__)


def _hint(name: str, known: list[str]) -> str:
    if name in _ELSEWHERE:
        return f": here it is {_ELSEWHERE[name]}"
    near = get_close_matches(name, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f". There are {', '.join(known)}"


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
        check_not_negative(self, "damping")
        check_counts(self, "cg_max_iter")
