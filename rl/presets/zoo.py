"""The names of rl-baselines3-zoo's hyper-parameters, in ours.

They mean what stable-baselines3 and sb3-contrib make of them; other options keep our defaults.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from gymnasium import spaces

from ..envs.make import make_envs
from ..fits import AdamFit
from ..networks.encoders import Activation
from ..options import convert

# a key that sets one option: the first of these that the algorithm has
_ONE: dict[str, tuple[str, ...]] = {
    "n_timesteps": ("total_timesteps",),
    "learning_rate": ("lr", "policy_lr", "critic_fit.lr"),
    "batch_size": ("critic_fit.batch_size",),  # PPO has an option of that name
    "n_critic_updates": ("critic_fit.epochs",),
    "cg_damping": ("damping",),
    "cg_max_steps": ("cg_max_iter",),
    "target_kl": ("delta", "kl_target", "kl_limit"),
    "n_epochs": ("epochs",),
    "ent_coef": ("entropy_coef",),
    "vf_coef": ("value_coef",),
    "clip_range": ("clip",),
}
_CRITIC = {"critic_fit.lr": float, "critic_fit.batch_size": int, "critic_fit.epochs": int}
# what is not there, and the values that do not ask for it
_NOT_THERE = {"use_sde": False, "sde_sample_freq": -1, "sub_sampling_factor": 1}
_NOT_THERE |= {"frame_stack": 1, "env_wrapper": None}
_OTHERS = ("n_steps", "normalize", "policy", "policy_kwargs")


@dataclass(frozen=True)
class Target:
    """What keys are translated for: an algorithm, with the types of its options, in some copies."""

    algorithm: str
    env_id: str
    n_envs: int
    kinds: Mapping[str, Any]

    def name_of(self, key: str) -> str | None:
        """Return the option that one of the keys above sets; None if the algorithm has none."""
        kinds = self.kinds if "epochs" in self.kinds else {**self.kinds, **_CRITIC}  # not of PPO
        return next((name for name in _ONE.get(key, ()) if name in kinds), None)


def translate(entries: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return the options, by our names, that the zoo's keys stand for."""
    options: dict[str, Any] = {}
    for key, value in entries.items():
        options |= _one(key, value, target)
    critic = {k.partition(".")[2]: options.pop(k) for k in _CRITIC if k in options}
    return options | ({"critic_fit": AdamFit(**critic)} if critic else {})


def _one(key: str, value: Any, target: Target) -> dict[str, Any]:
    if key in _NOT_THERE:
        if value is None or value == _NOT_THERE[key]:
            return {}
        what = "asks for what is not there: deleting the line trains without it"
        raise ValueError(f"{key}={value!r} {what}")
    match key:
        case "n_steps":  # of each copy; there is one where the file does not say
            steps = convert(key, int, value, text=True)
            return {"n_envs": target.n_envs, "steps_per_update": steps * target.n_envs}
        case "normalize":
            return _normalize(value)
        case "policy":
            if value == "MlpPolicy":
                return {}
            raise ValueError(
                f"policy must be MlpPolicy, got {value!r}: deleting the line leaves the networks to"
                " the observations (images go through a CNN) and to hidden"
            )
        case "policy_kwargs":
            return _policy_kwargs(value)
    name = target.name_of(key)
    if name is None:
        known = [*target.kinds, *_OTHERS, *(k for k in _ONE if target.name_of(k))]
        near = get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(target.kinds)}"
        raise ValueError(f"{target.algorithm} has no option {key!r}: {hint}")
    kind = {**target.kinds, **_CRITIC}[name]
    if not (isinstance(value, str) and value.startswith("lin_")):
        number = convert(key, kind, value, text=True)
        if key in ("target_kl", "cg_damping") and number is not None:
            number *= _kl_factor(name, target.env_id)  # a damping is one of the KL's curvature
        return {name: number}
    if f"final_{name}" not in target.kinds or name == "delta":
        where = f"{name} of {target.algorithm}"
        raise ValueError(f"{key}={value!r} is a schedule, and {where} has none: give a number")
    return {name: convert(key, kind, value.removeprefix("lin_"), text=True), f"final_{name}": 0.0}


def _kl_factor(name: str, env_id: str) -> float:
    """Return our bound on the KL over theirs."""
    if name == "kl_limit":  # their PPO stops beyond 1.5 times the target
        return 1.5
    # their TRPO averages the KL over the components of Box and MultiBinary actions
    envs = make_envs(env_id, 1, "sync")
    envs.close()
    space = envs.single_action_space
    return math.prod(space.shape) if isinstance(space, spaces.Box | spaces.MultiBinary) else 1


def _normalize(value: Any) -> dict[str, Any]:
    given = parse_literal("normalize", value)
    if isinstance(given, bool):
        given = {"norm_obs": given, "norm_reward": given}
    if not isinstance(given, dict) or given.keys() - {"norm_obs", "norm_reward"}:
        kinds = "true, false, or a mapping of norm_obs and norm_reward"
        raise ValueError(f"normalize must be {kinds}, got {value!r}")
    names = {"norm_obs": "normalise_observations", "norm_reward": "normalise_rewards"}
    return {ours: convert(name, bool, given.get(name, True)) for name, ours in names.items()}


def _policy_kwargs(value: Any) -> dict[str, Any]:
    """Translate widths and activation; of the rest only what the networks are is accepted."""
    given = parse_literal("policy_kwargs", value)
    if not isinstance(given, dict):
        raise ValueError(f"policy_kwargs must be a mapping, got {value!r}")
    options: dict[str, Any] = {}
    for key, item in given.items():
        where = f"{key} of policy_kwargs"
        match key:
            case "net_arch":
                options |= _widths(where, item)
            case "activation_fn":
                name = str(item).rpartition(".")[2].lower()
                options["activation"] = convert(where, Activation, name)
            case "ortho_init":
                if item is not True:
                    raise ValueError(f"{where} must be true, got {item!r}: weights are orthogonal")
            case _:
                raise ValueError(f"{where} is not there: deleting it trains without it")
    return options


def _widths(where: str, given: Any) -> dict[str, Any]:
    match given:
        case [dict()]:  # how older versions of the zoo write it
            given = given[0]
    if not isinstance(given, dict):
        return {"hidden": convert(where, tuple[int, ...], given, text=True)}
    if given.keys() != {"pi", "vf"}:
        raise ValueError(f"{where} must give widths of policy (pi) and critic (vf), got {given!r}")
    policy, critic = (convert(where, tuple[int, ...], given[k], text=True) for k in ("pi", "vf"))
    return {"hidden": policy} | ({"critic_hidden": critic} if critic != policy else {})


def parse_literal(key: str, value: Any) -> Any:
    """Return what a string of literals, ``dict(...)`` and dotted names says; others as they are.

    Nothing is evaluated: names, such as ``nn.Tanh``, come back as strings.
    """
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(_Plain().visit(ast.parse(value.strip(), mode="eval")))
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):  # the last: nested
        raise ValueError(
            f"{key} must be a mapping, or a string such as 'dict(a=1, b=[2, 3])', got"
            f" {value!r:.200}"
        ) from None


class _Plain(ast.NodeTransformer):
    """Writes ``dict(...)`` as a literal and names as strings; other calls stay, and are refused."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        names = [keyword.arg for keyword in node.keywords]
        if ast.unparse(node.func) != "dict" or node.args or None in names:  # None is of **mapping
            raise ValueError
        values = [self.visit(keyword.value) for keyword in node.keywords]
        return ast.Dict([*map(ast.Constant, names)], values)

    def visit_Name(self, node: ast.Name | ast.Attribute) -> ast.AST:
        return ast.Constant(ast.unparse(node))

    visit_Attribute = visit_Name
