"""What an environment is, and what would be used to learn in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import gymnasium
from gymnasium.utils.env_checker import check_env

from ..agent import Agent
from ..config import Config
from ..envs.make import describe, make_envs
from ..envs.pool import PoolVectorEnv
from .logs import entry

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # gymnasium's warnings are yellow


def inspect_env(
    env: str | Callable[[], gymnasium.Env[Any, Any]], algorithm: type[Agent], config: Config
) -> tuple[list[str], bool]:
    """Return what there is to know, and whether an agent can be made and no check failed."""
    envs = make_envs(env, config.n_envs, config.vectorization)
    mode = envs.metadata["autoreset_mode"].value
    lines = [
        entry("environments", f"{describe(envs)}, autoreset {mode}"),
        entry("observations", " ".join(str(envs.single_observation_space).split())),
        entry("actions", envs.single_action_space),
    ]
    sound, usual = True, type(config)()
    try:
        agent = algorithm(envs, **config.to_dict())
        layout, head = agent.layout, type(getattr(agent.policy, "head", agent.policy)).__name__
        parts = ", ".join(f"{p.name or 'all'}: {p.kind} {p.shape}" for p in layout.parts)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (agent.policy, agent.critic)]
        lines += [
            entry("rows", f"{layout.width} columns of {layout.dtype}; {parts}"),
            entry("policy", f"{head}, {sizes[0]:,} parameters"),
            entry("critic", f"{sizes[1]:,} parameters"),
        ]
    except ValueError as error:
        lines.append(entry("no agent", error))
        sound = False
    finally:
        envs.close()
    options = [(f.name, getattr(config, f.name), getattr(usual, f.name)) for f in fields(config)]
    changed = ", ".join(f"{name}={value}" for name, value, default in options if value != default)
    lines.append(entry("options", changed or "all at their defaults"))
    if isinstance(envs, PoolVectorEnv):
        lines.append(entry("gymnasium", "its checker cannot be run on environments by envpool"))
        return lines, sound
    failure, remarks = _gymnasium_check(gymnasium.make(env) if isinstance(env, str) else env())
    lines.append(entry("gymnasium", f"its checker {'fails' if failure else 'passes'}"))
    return lines + [entry("", remark) for remark in failure + remarks], sound and not failure


def _gymnasium_check(env: gymnasium.Env[Any, Any]) -> tuple[list[str], list[str]]:
    """Return why gymnasium's checker failed, if so, and its warnings; close the environment."""
    failure: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(env.unwrapped, skip_render_check=True)
        except Exception as error:  # the environment's own, or an assertion of the checker
            failure = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        finally:
            env.close()
    return failure, sorted({" ".join(_COLOUR.sub("", str(w.message)).split()) for w in caught})
