"""What the commands of the command line take, and what their help says."""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, cast, get_args

import gymnasium
import tyro
from tyro.conf import FlagCreatePairsOff, OmitArgPrefixes, Positional, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..agent import Agent
from ..algorithms import ALGORITHMS
from ..config import Config
from ..experience.advantages import ADVANTAGES, Advantages
from ..fits import FITS, CriticFit
from ..options import record_to_text
from ..presets import load_preset
from ..saving import refuse_module
from .folder import read_config

C = TypeVar("C", bound=Config)
_optional = partial(arg, help_behavior_hint="")  # the text says what is done by default
_Flag = FlagCreatePairsOff[bool]
_Words = Annotated[tuple[str, ...], _optional(metavar="KEY=VALUE ...")]
_Limit = Annotated[int | None, _optional(metavar="INT")]
_registry = ConstructorRegistry()


@_registry.primitive_rule
def _record_as_text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read options that are small records as the text that the config takes."""
    kinds = get_args(info.type)
    records = ADVANTAGES if Advantages in kinds else FITS if CriticFit in kinds else None
    if records is None:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(records) + "}[:NAME=VALUE,...]",
        instance_from_str=lambda words: words[0],
        is_instance=lambda _: True,
        str_from_instance=lambda x: [record_to_text(x, records) or str(x)],
    )


@dataclass(frozen=True, kw_only=True)
class Configured(Generic[C]):
    """What commands take that make an agent."""

    env_id: Positional[Annotated[str, _optional(metavar="ENV_ID")]] = ""
    """Environment id such as CartPole-v1, or module:MyEnv-v0 if a module registers it."""
    env_kwargs: _Words = ()
    """Arguments for the environment, for example gravity=9.8."""
    algo: Annotated[str, arg(metavar="{" + ",".join(ALGORITHMS) + "}")] = "trpo"
    """Algorithm. It decides which of the options below there are."""
    preset: Annotated[str | None, _optional(metavar="FILE")] = None
    """Options to start from: "default" for ours, or a YAML file, such as rl-baselines3-zoo's."""
    config: OmitArgPrefixes[C]


@dataclass(frozen=True, kw_only=True)
class Train(Configured[C]):
    """Train an agent in an environment and keep the run in a folder."""

    total_timesteps: int = 100_000
    """Environment steps to train for, rounded up to whole updates."""
    out: Annotated[Path | None, _optional(metavar="FOLDER")] = None
    """Run folder, which must not exist; by default runs/ENV_ID/ALGO-seedSEED-TIME."""
    resume: Annotated[Path | None, _optional(metavar="RUN")] = None
    """Run folder to go on with, from its last checkpoint; other options change its options."""
    save_every: Annotated[float, arg(metavar="MINUTES")] = 5.0
    """Minutes between two checkpoints. The last two are kept, and the best agent."""
    eval_episodes: int = 20
    """Episodes of the evaluation after training, with deterministic actions."""
    max_episode_steps: _Limit = None
    """Steps after which the evaluation cuts an episode off; by default 10,000 or a longer limit."""
    log_every: _Limit = None
    """Updates per row of the table; by default as many as give about thirty rows."""
    tensorboard: _Flag = False
    """Write TensorBoard's files to the folder tensorboard in the run folder."""
    progress: bool = True
    """Show a progress bar if the terminal can."""


@dataclass(frozen=True, kw_only=True)
class Check(Configured[C]):
    """Check an environment, and say what would be used to learn in it."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What commands take that use a trained agent."""

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """Run folder, or a checkpoint file."""
    env: Annotated[str | None, _optional(metavar="ENV_ID")] = None
    """Environment id; by default that of the training."""
    env_kwargs: _Words = ()
    """Arguments for the environment; by default those of the training."""
    seed: int = 0
    """Seed of the environments."""


@dataclass(frozen=True, kw_only=True)
class Eval(Trained):
    """Evaluate a trained agent."""

    episodes: int = 20
    """Number of episodes."""
    max_episode_steps: _Limit = None
    """Steps after which an episode is cut off; by default 10,000 or a longer time limit."""
    stochastic: _Flag = False
    """Draw actions instead of taking the most likely one."""


@dataclass(frozen=True, kw_only=True)
class Record(Trained):
    """Film a trained agent as an animated GIF or as MP4."""

    out: Annotated[Path | None, _optional(metavar="FILE")] = None
    """File to write, .gif or .mp4; by default recording.gif in the run folder."""
    episodes: int = 1
    """Number of episodes."""
    max_frames: int = 1000
    """Frames after which the film ends."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draw the returns and KLs of runs, averaged over seeds."""

    runs: Positional[Annotated[tuple[Path, ...], _optional(metavar="RUN ...")]]
    """Run folders. Those that differ in nothing but the seed are drawn as one curve."""
    out: Annotated[Path, arg(metavar="FILE")] = Path("runs.png")
    """File to write."""


def parse(kind: Any, prog: str, arguments: Sequence[str]) -> Any:
    """Return a command of one of these kinds, with the config of its algorithm.

    Raises:
        ValueError: there is no environment, or a run to resume is another one's.

    """
    if not issubclass(kind, Configured):
        return tyro.cli(kind, prog=prog, args=arguments)
    chooser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    chooser.add_argument("--algo", choices=ALGORITHMS)
    if kind is Train:
        chooser.add_argument("--resume", type=Path)
    chosen, _ = chooser.parse_known_args(arguments)
    run = getattr(chosen, "resume", None)
    saved = None if run is None else read_config(run)
    name = (chosen.algo or "trpo") if saved is None else saved["algorithm"]
    algorithm, generic = ALGORITHMS[name], cast("Any", kind)
    read = partial(
        tyro.cli, generic[algorithm.config_class], prog=prog, args=arguments, registry=_registry
    )
    if saved is not None:
        return _resumed(read, algorithm, saved)
    command: Any = read()
    if not command.env_id:
        raise ValueError("which environment? For example: python -m rl train CartPole-v1")
    if command.preset is None:
        return command
    file = None if command.preset == "default" else command.preset
    preset = load_preset(algorithm.name, command.env_id, file)
    command = replace(command, config=algorithm.config_class(**preset.options))
    if isinstance(command, Train) and preset.total_timesteps is not None:
        command = replace(command, total_timesteps=preset.total_timesteps)
    return read(default=command)  # what is said on the command line wins


def _resumed(read: Callable[..., Any], algorithm: type[Agent], saved: dict[str, Any]) -> Any:
    """Return the command of a run that goes on: as it was, but what the command line changes."""
    options = {f.name: saved[f.name] for f in fields(algorithm.config_class) if f.name in saved}
    words = tuple(f"{key}={value!r}" for key, value in saved.get("env_kwargs", {}).items())
    total, config = saved["total_timesteps"], algorithm.config_class.from_dict(options)
    command = read(
        default=Train(config=config, algo=algorithm.name, total_timesteps=total, env_kwargs=words)
    )
    for given, own, what in (
        (command.env_id, saved["env_id"], "environment"),
        (command.algo, algorithm.name, "algorithm"),
    ):
        if given not in ("", own):
            raise ValueError(f"{command.resume} is a run of the {what} {own}, not {given}")
    for name in ("out", "preset"):
        if getattr(command, name) is not None:
            raise ValueError(f"--{name} is for new runs, and --resume goes on with an old one")
    if not command.env_id:
        refuse_module(saved["env_id"], "")
    return replace(command, env_id=saved["env_id"])


def env_source(env_id: str, kwargs: dict[str, Any]) -> Any:
    """Return the id, or a function that makes its environment with arguments."""

    def make(**more: Any) -> gymnasium.Env[Any, Any]:
        try:
            return gymnasium.make(env_id, **kwargs, **more)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"cannot make environment {env_id!r}: {reason}") from error

    return make if kwargs else env_id


def env_keywords(words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments that KEY=VALUE words give."""
    arguments: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key.isidentifier()):
            raise ValueError(f"--env-kwargs takes KEY=VALUE, got {word!r}")
        arguments[key] = text
        for read in (ast.literal_eval, json.loads):  # 9.8, [1, 2], True, true; else a word
            with contextlib.suppress(ValueError, SyntaxError):
                arguments[key] = read(text)
    return arguments
