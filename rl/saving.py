"""What a checkpoint says of an agent, and the agent that it says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gymnasium import Space
from torch import nn

from . import checkpoint
from .build import with_copies
from .envs.layout import ObservationLayout
from .envs.spaces_json import space_from_json, space_to_json
from .networks.policy import Policy


def describe(agent: Any) -> dict[str, Any]:
    """Return what is needed to build the networks of an agent without its environment."""
    layout, origin = agent.layout, agent.layout.origin
    try:
        action_space = space_to_json(agent.action_space)
    except ValueError:  # a space for a policy of one's own
        action_space = None
    return {
        "algorithm": agent.name,
        "env_id": agent.env_id,
        "config": agent.config.to_dict(),
        "layout": {
            "space": space_to_json(layout.space),
            "mask": 0 if layout.info_mask is None else layout.info_mask.shape[0],
            "origin": None if origin is None else torch.from_numpy(origin),
        },
        "action_space": action_space,
    }


def _spaces(saved: dict[str, Any]) -> tuple[ObservationLayout, Space[Any] | None]:
    """Return the layout of observations and the action space; None where a file cannot hold it."""
    mask, origin = saved["layout"]["mask"], saved["layout"]["origin"]
    space = space_from_json(saved["layout"]["space"])
    layout = ObservationLayout(space, mask, None if origin is None else origin.numpy())
    actions = saved["action_space"]
    return layout, None if actions is None else space_from_json(actions)


def load_into(
    agent: Any, path: Path, options: dict[str, Any], policy: Policy | None, critic: nn.Module | None
) -> None:
    """Build an agent, of which only the source of its environments is known, from a file."""
    saved = checkpoint.read(path)
    if saved["algorithm"] != agent.name:
        raise checkpoint.CheckpointError(
            f"{path} holds an agent of {saved['algorithm']!r}, not {agent.name!r}"
        )
    agent.config = agent.config_class.from_dict({**saved["config"], **options})
    agent.layout, agent.action_space = _spaces(saved)
    if agent.source is None:
        agent.source = saved["env_id"]
    else:
        agent.config = with_copies(agent.config, options, agent.envs)
    agent.build(agent.config, agent.layout, agent.action_space, policy, critic)
    _restore(agent, saved["agent"], options)
    if saved["run"] is not None:
        agent.training.load_state_dict(saved["run"])


def _restore(agent: Any, state: dict[str, Any], options: dict[str, Any]) -> None:
    """Give an agent the state of a file, but the options that were changed.

    Raises:
        CheckpointError: the state does not fit the agent.

    """
    parts = state["parts"]
    if "critic_fit" in options and "critic_optimizer" in parts:
        parts["critic_optimizer"] = agent.optimizers()["critic_optimizer"].state_dict()
    try:
        agent.load_state_dict(state)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"the file: {error}") from error
    optimizers = [o for k, o in agent.optimizers().items() if k != "critic_optimizer"]
    for group in (group for o in optimizers for group in o.param_groups):  # they hold options, too
        group.update({name: getattr(agent.config, name) for name in options if name in group})


def load_parts(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Load modules and optimizers.

    Raises:
        ValueError: names or shapes do not fit.

    """
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):
                count = sum(len(group["params"]) for group in part.param_groups)
                if not set(saved[name]["state"]) <= set(range(count)):  # frozen ones have none
                    raise ValueError(f"the state of {name} is not that of {count} parameters")
            part.load_state_dict(saved[name])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the state does not fit this agent: {reason}") from error
