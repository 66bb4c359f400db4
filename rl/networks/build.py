"""The networks of an agent, from its environments' spaces and its options."""

from __future__ import annotations

from typing import Any

from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import nn

from ..config import Config
from ..envs.layout import ObservationLayout
from ..envs.stepper import Stepper
from ..networks.critic import Critic
from .encoders import Encoder
from .heads import make_head
from .moments import ObservationNorm
from .policy import HeadPolicy, Policy


def observation_layout(
    envs: VectorEnv, seed: int = 0, *, normalise: bool = False
) -> ObservationLayout:
    """Return how observations lie in rows; action masks in the infos of a reset are part of them.

    Args:
        envs: the environments, which are reset to see what they give.
        seed: of that reset. Take the one of the first rollout, so that the environments see no
            other.
        normalise: whether observations are to be normalised, and so need no zero of their own:
            those that float32 would round are then measured from the first one.

    Raises:
        ValueError: observations that have no such form.

    """
    stepper = Stepper(envs)
    observations, _ = stepper.reset(seed)
    layout = ObservationLayout(envs.single_observation_space, mask=stepper.choices or 0)
    return layout.with_origin(observations) if normalise else layout


def observation_norm(layout: ObservationLayout, config: Config) -> ObservationNorm | None:
    """Return a normalisation where it is asked for and there is something to normalise."""
    columns = layout.vector_columns
    return ObservationNorm(len(columns)) if config.normalise_observations and columns else None


def make_networks(
    layout: ObservationLayout,
    action_space: Space[Any],
    norm: ObservationNorm | None,
    config: Config,
    policy: Policy | None = None,
    critic: nn.Module | None = None,
) -> tuple[Policy, nn.Module]:
    """Return a policy and a critic, which are the same up to their last layers if so asked.

    One that is given is taken as it is, and only the other made.

    Raises:
        ValueError: actions that have no distribution, or a mask that does not fit them.

    """
    if policy is None:
        head = make_head(
            action_space,
            squash=config.squash_actions,
            state_dependent_std=config.state_dependent_std,
        )
        mask = next(iter(layout.of_kind("mask")), None)
        policy = HeadPolicy(Encoder(layout, config.hidden, norm), head, mask)
    if critic is None:
        if config.shared_encoder and isinstance(policy, HeadPolicy):
            encoder = policy.encoder
        else:
            encoder = Encoder(layout, config.hidden, norm)
        critic = Critic(encoder)
    return policy, critic
