"""What an environment is, and what would be used to learn in it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeAlias

import gymnasium
from gymnasium.utils.env_checker import check_env

from ..agent import Agent
from ..config import Config
from ..envs.make import describe, make_envs
from ..envs.pool import PoolVectorEnv
from .logs import entry

Source: TypeAlias = "str | Callable[[], gymnasium.Env[Any, Any]]"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # gymnasium's warnings are yellow


def inspect_env(env: Source, algorithm: type[Agent], config: Config) -> tuple[list[str], bool]:
    """Make an agent for an environment, and run gymnasium's checker if the environment is its own.

    Args:
        env: an id, or a function that makes an environment.
        algorithm: the class of the agent.
        config: options of the agent.

    Returns:
        Lines to read, and whether an agent can be made and no check failed.

    Raises:
        ValueError: there is no such environment.

    """
    envs = make_envs(env, config.n_envs, config.vectorization)
    mode = envs.metadata["autoreset_mode"].value
    lines = [
        entry("environments", f"{describe(envs)}, autoreset {mode}"),
        entry("observations", " ".join(str(envs.single_observation_space).split())),
        entry("actions", envs.single_action_space),
    ]
    sound = True
    try:
        lines += _agent(algorithm(envs, **config.to_dict()))
    except ValueError as error:
        lines.append(entry("no agent", error))
        sound = False
    finally:
        envs.close()
    lines.append(entry("options", _changed(config) or "all at their defaults"))
    if isinstance(envs, PoolVectorEnv):
        lines.append(entry("gymnasium", "its checker cannot be run on environments by envpool"))
        return lines, sound
    failure, remarks = _gymnasium_check(env)
    lines.append(entry("gymnasium", f"its checker {'fails' if failure else 'passes'}"))
    lines += [entry("", remark) for remark in failure + remarks]
    return lines, sound and not failure


def _agent(agent: Agent) -> list[str]:
    """Return the lines about an agent."""
    layout = agent.layout
    parts = ", ".join(f"{part.name or 'all'}: {part.kind} {part.shape}" for part in layout.parts)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (agent.policy, agent.critic)]
    head = type(getattr(agent.policy, "head", agent.policy)).__name__
    return [
        entry("rows", f"{layout.width} columns of {layout.dtype}; {parts}"),
        entry("policy", f"{head}, {sizes[0]:,} parameters"),
        entry("critic", f"{sizes[1]:,} parameters"),
    ]


def _changed(config: Config) -> str:
    """Return the options that are not the defaults, as they come from a preset."""
    default = type(config)()
    pairs = [(f.name, getattr(config, f.name), getattr(default, f.name)) for f in fields(config)]
    return ", ".join(f"{name}={value}" for name, value, usual in pairs if value != usual)


def _gymnasium_check(env: Source) -> tuple[list[str], list[str]]:
    """Run the checker on a single environment; return why it failed, if so, and its warnings."""
    single = gymnasium.make(env) if isinstance(env, str) else env()
    failure: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_env(single.unwrapped, skip_render_check=True)
        except Exception as error:  # the environment's own, or an assertion of the checker
            failure = [f"{type(error).__name__}: {' '.join(str(error).split())}"]
        finally:
            single.close()
    remarks = {" ".join(_COLOUR.sub("", str(w.message)).split()) for w in caught}
    return failure, sorted(remarks)
