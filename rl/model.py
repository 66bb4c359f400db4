"""The networks of an agent, from its environments' spaces and its options."""

from __future__ import annotations

from typing import Any

from gymnasium import Space
from gymnasium.vector import VectorEnv

from .config import Config
from .heads import make_head
from .networks import Encoder
from .normalisation import ObservationNorm
from .policies import HeadPolicy
from .spaces import MASK, ObservationLayout
from .value import Critic


def observation_layout(envs: VectorEnv) -> ObservationLayout:
    """Return how observations lie in rows; action masks in the infos of a reset are part of them.

    Raises:
        ValueError: observations that have no such form.

    """
    _, infos = envs.reset(seed=0)
    masks = infos.get(MASK)
    return ObservationLayout(
        envs.single_observation_space, mask=0 if masks is None else masks[0].size
    )


def observation_norm(layout: ObservationLayout, config: Config) -> ObservationNorm | None:
    """Return a normalisation where it is asked for and there is something to normalise."""
    columns = layout.vector_columns
    return ObservationNorm(len(columns)) if config.normalise_observations and columns else None


def make_networks(
    layout: ObservationLayout,
    action_space: Space[Any],
    norm: ObservationNorm | None,
    config: Config,
) -> tuple[HeadPolicy, Critic]:
    """Return a policy and a critic, which are the same up to their last layers if so asked.

    Raises:
        ValueError: actions that have no distribution, or a mask that does not fit them.

    """
    head = make_head(
        action_space, squash=config.squash_actions, state_dependent_std=config.state_dependent_std
    )
    encoder = Encoder(layout, config.hidden, norm)
    mask = next(iter(layout.of_kind("mask")), None)
    policy = HeadPolicy(encoder, head, mask)
    critic = Critic(encoder if config.shared_encoder else Encoder(layout, config.hidden, norm))
    return policy, critic
