"""What a checkpoint says of an agent, and the agent that it says.

A file is checked in full before anything of its agent is made: forged options can ask for networks
of any size, and for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from . import checkpoint
from .build import make_networks, observation_norm, with_copies
from .envs.layout import ObservationLayout
from .envs.spaces_json import space_from_json, space_to_json
from .experience.reward_scale import RewardScale
from .matching import check_module, check_optimizer, check_shapes, check_types
from .networks.policy import Policy
from .undo import undone_on_error

_NONE = type(None)
_STATE = {"parts": dict, "generator": Tensor, "num_timesteps": int, "iterations": int}
_FILE = {
    "algorithm": str,
    "env_id": (str, _NONE),
    "config": dict,
    "layout": {"space": dict, "mask": int, "origin": (Tensor, _NONE)},
    "action_space": (dict, _NONE),
    "notes": dict,
    "agent": _STATE,
    "run": (dict, _NONE),
}
_LEAST = 2**26  # bytes of networks and of spaces that any file may ask for


@dataclass(frozen=True)
class NamedByFile:
    """The id of an environment whose module nobody but a file asked to import."""

    env_id: str


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
    most = max(_LEAST, _bytes(saved["agent"]))
    mask, origin = saved["layout"]["mask"], saved["layout"]["origin"]
    if not 0 <= 8 * mask <= most:
        raise ValueError(f"an action mask of {mask} entries")
    if origin is not None and not (origin.dtype == torch.float64 and origin.isfinite().all()):
        raise ValueError("the origin of observations is not finite numbers in float64")
    space = space_from_json(saved["layout"]["space"], most)
    layout = ObservationLayout(space, mask, None if origin is None else origin.numpy())
    actions = saved["action_space"]
    return layout, None if actions is None else space_from_json(actions, most)


def load_into(
    agent: Any, path: Path, options: dict[str, Any], policy: Policy | None, critic: nn.Module | None
) -> None:
    """Build an agent, of which only the source of its environments is known, from a file."""
    saved, given = checkpoint.read(path), agent.source is not None
    theirs = not (given or options)  # then whatever is wrong is the file's fault
    with _named(path):
        check_types(saved, _FILE, "the file")
        if saved["algorithm"] != agent.name:
            raise ValueError(f"holds an agent of {saved['algorithm']!r}, not {agent.name!r}")
        agent.layout, agent.action_space = _spaces(saved)
    with _named(path, all_of_it=theirs):
        agent.config = agent.config_class.from_dict({**saved["config"], **options})
        if isinstance(agent.source, gymnasium.Env | VectorEnv):  # which are there already
            agent.config = with_copies(agent.config, options, agent.envs)
        agent.config.check_batch()
    with _named(path):
        _check_networks(agent, saved["agent"], policy, critic)
    if not given and saved["env_id"] is not None:
        named = saved["env_id"]
        agent.source = NamedByFile(named) if ":" in named else named
    with _named(path, all_of_it=theirs):
        agent.build(agent.config, agent.layout, agent.action_space, policy, critic)
    with _named(path):
        _restore(agent, saved["agent"], options)
        if saved["run"] is not None:
            agent.training.load_state_dict(saved["run"])
    if given:
        _ = agent.envs  # made and compared now, not when they are first stepped


@contextmanager
def _named(path: Path, *, all_of_it: bool = True) -> Iterator[None]:
    """Turn errors of a forged file into CheckpointErrors that name it.

    Not ``all_of_it``: a ValueError, which may be the caller's, stays one.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except ValueError as error:
        if not all_of_it:
            raise ValueError(f"loading {path}: {_line(error)}") from error
        raise checkpoint.CheckpointError(f"{path}: {_line(error)}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        words = f"{path} does not hold an agent of this release: {type(error).__name__}"
        raise checkpoint.CheckpointError(f"{words}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_networks(
    agent: Any, state: dict[str, Any], policy: Policy | None, critic: nn.Module | None
) -> None:
    """Raise a ValueError unless a file has the weights that its options ask for.

    The networks are made without memory, on torch's meta device, and compared with the file.
    """
    config, parts, stored = agent.config, state["parts"], _bytes(state)
    layers = len(config.hidden) + len(config.critic_hidden or ())
    if layers > sum(len(p) for p in parts.values() if isinstance(p, Mapping)):
        raise ValueError(f"the state does not fit this agent: {layers} hidden layers")
    with torch.device("meta"):
        norm = observation_norm(agent.layout, config)
        networks = make_networks(agent.layout, agent.action_space, norm, config, policy, critic)
        scale = RewardScale(config.n_envs, config.gamma)
    made: dict[str, nn.Module] = dict(zip(("policy", "critic"), networks, strict=True))
    made |= {"reward_scale": scale} if config.normalise_rewards else {}
    own = [policy, critic]  # are what they are
    asked = 0
    for name, network in made.items():
        if not any(network is each for each in own):
            check_types(parts.get(name), dict, f"the state of {name}")
            with _misfit():
                check_shapes(name, network.state_dict(), parts[name])
            asked += sum(x.nbytes for x in (*network.parameters(), *network.buffers()))
    if asked > max(_LEAST, 4 * stored):
        raise ValueError(f"its options ask for {asked:,} bytes of networks, and it has {stored:,}")


def _bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state."""
    if isinstance(state, Tensor):
        return state.nbytes
    inner = state.values() if isinstance(state, Mapping) else state
    return sum(map(_bytes, inner)) if isinstance(state, Mapping | list) else 0


def _restore(agent: Any, state: dict[str, Any], options: dict[str, Any]) -> None:
    """Give an agent the state of a file, but the options that were changed.

    Raises:
        ValueError: the state does not fit the agent.

    """
    parts = state["parts"]
    if "critic_fit" in options and "critic_optimizer" in parts:
        parts["critic_optimizer"] = agent.optimizers()["critic_optimizer"].state_dict()
    agent.load_state_dict(state)
    optimizers = [o for k, o in agent.optimizers().items() if k != "critic_optimizer"]
    for group in (group for o in optimizers for group in o.param_groups):  # they hold options, too
        group.update({name: getattr(agent.config, name) for name in options if name in group})


def check_state(state: Any) -> None:
    """Raise a ValueError unless a state has the entries of an agent's, of their types."""
    check_types(state, _STATE, "the state of the agent")
    for name in ("num_timesteps", "iterations"):
        if state[name] < 0:
            raise ValueError(f"{name} of the state must not be negative, got {state[name]}")
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError("the random state is none of torch's generator on the CPU") from error


def load_parts(parts: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Load modules and optimizers, all or none.

    Raises:
        ValueError: names, shapes or numbers do not fit; says which.

    """
    with _misfit(), ExitStack() as stack:
        for name, part in parts.items():
            check_types(saved, {name: dict}, "the state")
            if isinstance(part, torch.optim.Optimizer):
                check_optimizer(name, part, saved[name])
                stack.enter_context(undone_on_error(optimizers=[part]))
            else:
                check_module(name, part, saved[name])
                stack.enter_context(undone_on_error(part))
        for name, part in parts.items():
            part.load_state_dict(saved[name])


@contextmanager
def _misfit() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"the state does not fit this agent: {_line(error)}") from error


def check_source(source: Any) -> None:
    """Raise a ValueError where an agent was loaded and nothing says what to train it in."""
    if isinstance(source, NamedByFile):
        refuse_module(source.env_id, "env=")
    if source is None:
        raise ValueError(
            "this agent was loaded without an environment, which predict does not need: pass"
            " env= to load"
        )


def refuse_module(env_id: str, argument: str) -> None:
    """Raise a ValueError for an id, read from a file, that would import a module of its choice."""
    module, colon, _ = env_id.partition(":")
    if colon:
        raise ValueError(
            f"the environment {env_id!r} is named by a file, and making it imports the module"
            f" {module!r}, which runs its code: if you trust it, pass {argument}{env_id}"
        )
