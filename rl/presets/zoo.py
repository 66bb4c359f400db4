"""The names of rl-baselines3-zoo's hyper-parameters, in ours.

What they mean is what stable-baselines3 and sb3-contrib do with them; options that a file leaves
out keep the defaults of this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gymnasium import spaces

from ..envs.make import make_envs
from .values import convert, parse_literal

# a key that sets one option: the first of these that the algorithm has
_ONE: dict[str, tuple[str, ...]] = {
    "n_timesteps": ("total_timesteps",),
    "learning_rate": ("lr", "policy_lr", "critic_lr"),
    "batch_size": ("critic_batch_size",),  # PPO has an option of that name
    "n_critic_updates": ("critic_epochs",),
    "cg_damping": ("damping",),
    "cg_max_steps": ("cg_max_iter",),
    "target_kl": ("delta", "kl_target", "kl_limit"),
    "n_epochs": ("epochs",),
    "ent_coef": ("entropy_coef",),
    "vf_coef": ("value_coef",),
    "clip_range": ("clip",),
}
# what is not there, and the values that do not ask for it
_NOT_THERE: dict[str, Any] = {
    "use_sde": False,
    "sde_sample_freq": -1,
    "sub_sampling_factor": 1,
    "frame_stack": 1,
    "env_wrapper": None,
}


@dataclass(frozen=True)
class Target:
    """What the keys are translated for.

    Attributes:
        algorithm: its name.
        env_id: the environment.
        n_envs: number of copies of the environment.
        kinds: types of the options there are, by name.

    """

    algorithm: str
    env_id: str
    n_envs: int
    kinds: Mapping[str, Any]


def translate(key: str, value: Any, target: Target) -> dict[str, Any]:
    """Return the options, by our names, that one of the zoo's keys stands for.

    Raises:
        ValueError: an unknown key, one that asks for what is not there, or a value of the wrong
            type.

    """
    if key in _NOT_THERE:
        if value is None or value == _NOT_THERE[key]:
            return {}
        raise ValueError(
            f"{key}={value!r} asks for what is not there: deleting the line trains without it"
        )
    if key in _RULES:
        return _RULES[key](value, target)
    name = _option(key, target)
    if name is None:
        raise ValueError(_unknown(key, target))
    kind = target.kinds[name]
    if isinstance(value, str) and value.startswith("lin_"):
        if f"final_{name}" not in target.kinds:
            raise ValueError(
                f"{key}={value!r} is a schedule, and {name} of {target.algorithm} has none: give a"
                " number"
            )
        return {name: convert(key, kind, value.removeprefix("lin_")), f"final_{name}": 0.0}
    number = convert(key, kind, value)
    if key in ("target_kl", "cg_damping") and number is not None:
        number *= _kl_factor(name, target.env_id)  # a damping is relative to the KL's curvature
    return {name: number}


def _option(key: str, target: Target) -> str | None:
    return next((name for name in _ONE.get(key, ()) if name in target.kinds), None)


def _unknown(key: str, target: Target) -> str:
    known = [*target.kinds, *_RULES, *(name for name in _ONE if _option(name, target))]
    near = get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(target.kinds)}"
    return f"{target.algorithm} has no option {key!r}: {hint}"


def _kl_factor(name: str, env_id: str) -> float:
    """Return our bound on the KL over theirs.

    Their PPO estimates the joint KL from log-probabilities, as ours is, and stops beyond 1.5 times
    the target. Their TRPO takes the mean over the matrix of KLs by state and component of the
    action, for distributions that have one per component; that of Discrete and MultiDiscrete
    actions is joint.
    """
    if name == "kl_limit":
        return 1.5
    envs = make_envs(env_id, 1, "sync")
    space = envs.single_action_space
    envs.close()
    if isinstance(space, spaces.Box | spaces.MultiBinary):
        return math.prod(space.shape)
    return 1


def _steps(value: Any, target: Target) -> dict[str, Any]:
    """Translate n_steps, which is of each copy; there is one copy where the file does not say."""
    steps = convert("n_steps", int, value)
    return {"n_envs": target.n_envs, "steps_per_update": steps * target.n_envs}


def _normalize(value: Any, _: Target) -> dict[str, Any]:
    given = parse_literal("normalize", value) if isinstance(value, str) else value
    if isinstance(given, bool):
        given = {"norm_obs": given, "norm_reward": given}
    if not isinstance(given, dict) or given.keys() - {"norm_obs", "norm_reward"}:
        raise ValueError(
            "normalize must be true, false, or a mapping of norm_obs and norm_reward, got"
            f" {value!r}"
        )
    return {
        "normalise_observations": convert("norm_obs", bool, given.get("norm_obs", True)),
        "normalise_rewards": convert("norm_reward", bool, given.get("norm_reward", True)),
    }


def _policy(value: Any, _: Target) -> dict[str, Any]:
    if value != "MlpPolicy":
        raise ValueError(
            f"policy must be MlpPolicy, got {value!r}: deleting the line leaves the networks to the"
            " observations (images go through a CNN) and to hidden"
        )
    return {}


def _policy_kwargs(value: Any, _: Target) -> dict[str, Any]:
    """Translate widths; of the rest only what the networks are anyway is accepted."""
    given = parse_literal("policy_kwargs", value) if isinstance(value, str) else value
    if not isinstance(given, dict):
        raise ValueError(f"policy_kwargs must be a mapping, got {value!r}")
    options: dict[str, Any] = {}
    for key, item in given.items():
        where = f"{key} of policy_kwargs"
        if key == "net_arch":
            options["hidden"] = _hidden(where, item)
        elif key == "activation_fn":
            if str(item).rpartition(".")[2] != "Tanh":
                raise ValueError(
                    f"{where} must be nn.Tanh, got {item!r}: deleting it trains with tanh layers"
                )
        elif key == "ortho_init":
            if item is not True:
                raise ValueError(
                    f"{where} must be true, got {item!r}: deleting it starts at orthogonal weights"
                )
        else:
            raise ValueError(f"{where} is not there: deleting it trains without it")
    return options


def _hidden(where: str, net_arch: Any) -> tuple[int, ...]:
    """Return the widths of policy and critic, which have the same."""
    given = net_arch
    match given:
        case [dict()]:  # how older versions of the zoo write it
            given = given[0]
    if isinstance(given, dict):
        widths = given.get("pi")
        if given.keys() != {"pi", "vf"} or widths != given["vf"]:
            raise ValueError(
                f"{where} must give policy (pi) and critic (vf) the same widths, got {net_arch!r}"
            )
        given = widths
    return convert(where, tuple[int, ...], given)


_RULES: dict[str, Callable[[Any, Target], dict[str, Any]]] = {
    "n_steps": _steps,
    "normalize": _normalize,
    "policy": _policy,
    "policy_kwargs": _policy_kwargs,
}
