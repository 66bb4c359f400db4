"""The command line: ``python -m rl train | eval | plot | record | check``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from ..agent import Agent
from ..algorithms import ALGORITHMS, load
from ..config import Config
from ..envs.make import describe
from ..presets import load_preset
from .evaluation import Evaluation, evaluate
from .inspection import inspect_env
from .logs import CSVLog, Table, plot_learning_curve, read_csv
from .plots import plot_runs
from .video import record

C = TypeVar("C", bound=Config)
_CHECKPOINT = "checkpoint.zip"


@dataclass(frozen=True)
class Configured(Generic[C]):
    """What commands have that make an agent."""

    env_id: tyro.conf.Positional[str]
    """Environment id, for example CartPole-v1."""

    config: tyro.conf.OmitArgPrefixes[C]

    preset: str | None = None
    """Options to start from, which the command line overrides: "default" for those that come with
    this package, or a YAML file of your own, in our names or those of rl-baselines3-zoo."""


@dataclass(frozen=True)
class Train(Configured[C]):
    """Train an agent on a gymnasium environment and keep the run in a folder.

    --algo NAME chooses the algorithm, and with it the options: trpo, which is the default, npg,
    kl_penalty, ppo or vpg.
    """

    total_timesteps: int = 100_000
    """Environment steps to train for; whole updates are made, so a few more may be taken."""

    out: Path | None = None
    """Run folder, which must not exist; runs/ENV_ID/ALGO-seedSEED-TIME by default."""

    eval_episodes: int = 20
    """Episodes of the evaluation after training, with deterministic actions."""

    log_every: int = 1
    """Updates a row of the table."""

    progress: bool = True
    """Show a progress bar where the terminal can."""


@dataclass(frozen=True)
class Eval:
    """Evaluate a trained agent."""

    run: tyro.conf.Positional[Path]
    """Run folder, or a checkpoint file."""

    episodes: int = 20
    """Number of episodes."""

    seed: int = 0
    """Seed of the environments."""

    stochastic: bool = False
    """Draw actions instead of taking the most likely one."""


@dataclass(frozen=True)
class Plot:
    """Draw the returns and KLs of runs; of several seeds the interquartile mean."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders."""

    out: Path = Path("runs.png")
    """File to write."""


@dataclass(frozen=True)
class Record:
    """Film a trained agent as an animated GIF."""

    run: tyro.conf.Positional[Path]
    """Run folder, or a checkpoint file."""

    out: Path | None = None
    """File to write; recording.gif in the run folder by default."""

    episodes: int = 1
    """Number of episodes."""

    seed: int = 0
    """Seed of the environment."""

    max_frames: int = 1000
    """Frames at which the film ends."""


@dataclass(frozen=True)
class Check(Configured[C]):
    """Check an environment, and say what would be used to learn in it."""


def train(command: Train[Any], algorithm: type[Agent]) -> int:
    """Run ``train``; return the exit code."""
    for name in ("total_timesteps", "eval_episodes", "log_every"):
        if getattr(command, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(command, name)}")
    agent = algorithm(command.env_id, **command.config.to_dict())
    out = _make_run_folder(command, algorithm.name)
    options = {
        "algorithm": algorithm.name,
        "env_id": command.env_id,
        "total_timesteps": command.total_timesteps,
    }
    (out / "config.json").write_text(json.dumps(options | command.config.to_dict(), indent=2))
    table, csv_log = Table(command.log_every), CSVLog(out / "progress.csv")
    print(f"{algorithm.__name__} on {describe(agent.envs)}, run folder {out}")
    interrupted, progress = False, command.progress and sys.stderr.isatty()
    try:
        agent.learn(command.total_timesteps, progress=progress, callback=(csv_log, table))
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: keeping what was learnt so far", file=sys.stderr)
    finally:  # also where an environment raises: what was learnt is kept
        agent.save(out / _CHECKPOINT)
    if agent.iterations:
        columns = read_csv(csv_log.path)
        title = f"{algorithm.__name__} on {command.env_id}, seed {command.config.seed}"
        plot_learning_curve(columns, out / "learning_curve.png", title=title)
        _print_summary(agent, columns, out)
    if interrupted:
        return 130  # as a shell reports an interrupt
    _print_evaluation(evaluate(agent, command.env_id, command.eval_episodes))
    return 0


def evaluate_run(command: Eval) -> int:
    """Run ``eval``; return the exit code."""
    path, agent = _trained(command.run)
    assert agent.env_id is not None  # load without env= made one from its id
    print(f"{path}: {type(agent).__name__} on {agent.env_id} after {agent.num_timesteps:,} steps")
    result = evaluate(
        agent,
        agent.env_id,
        command.episodes,
        seed=command.seed,
        deterministic=not command.stochastic,
    )
    _print_evaluation(result)
    return 0


def plot(command: Plot) -> int:
    """Run ``plot``; return the exit code."""
    groups = plot_runs(command.runs, command.out)
    for label, count in groups.items():
        print(f"{label}: {count} run{'s' * (count > 1)}")
    print(f"plot            {command.out}")
    return 0


def film(command: Record) -> int:
    """Run ``record``; return the exit code."""
    path, agent = _trained(command.run)
    assert agent.env_id is not None  # load without env= made one from its id
    out = command.out or path.parent / "recording.gif"
    returns = record(
        agent,
        agent.env_id,
        out,
        episodes=command.episodes,
        seed=command.seed,
        max_frames=command.max_frames,
    )
    print(f"returns         {', '.join(f'{value:.1f}' for value in returns)}")
    print(f"film            {out}")
    return 0


def check(command: Check[Any]) -> int:
    """Run ``check``; return the exit code."""
    lines, sound = inspect_env(command.env_id, command.config)
    print("\n".join(lines))
    return 0 if sound else 1


def _trained(run: Path) -> tuple[Path, Agent]:
    path = run / _CHECKPOINT if run.is_dir() else run
    return path, load(path)


def _make_run_folder(command: Train[Any], algorithm: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{algorithm}-seed{command.config.seed}-{stamp}"
    out = command.out or Path("runs") / command.env_id / name
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"{out} already exists and is kept as it is: choose another --out, or remove it"
        ) from error
    return out


def _print_summary(agent: Agent, columns: dict[str, list[float]], out: Path) -> None:
    seconds = columns["time/time_elapsed"][-1]
    print(f"learning curve  {out / 'learning_curve.png'}")
    print(f"checkpoint      {out / _CHECKPOINT}")
    print(
        f"speed           {columns['time/fps'][-1]:,.0f} steps per second, training included"
        f" ({agent.num_timesteps:,} steps in {seconds:.1f} s)"
    )
    kl = max(columns["train/kl_divergence_loss"])
    bound = f" of delta = {columns['trust/delta'][-1]:g}" if "trust/delta" in columns else ""
    success = columns.get("train/is_line_search_success")
    accepted = f", {int(sum(success))} accepted" if success else ""
    print(f"KL              at most {kl:.5f}{bound} in {agent.iterations} updates{accepted}")


def _print_evaluation(result: Evaluation) -> None:
    print(
        f"evaluation      mean return {result.mean:.1f} (standard deviation {result.std:.1f})"
        f" over {len(result.returns)} episodes"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run it; bad input is one line on stderr and exit code 1."""
    chooser = argparse.ArgumentParser(prog="python -m rl", add_help=False, allow_abbrev=False)
    chooser.add_argument("--algo", choices=ALGORITHMS, default="trpo")
    chosen, rest = chooser.parse_known_args(arguments)
    algorithm = ALGORITHMS[chosen.algo]
    command = _parse(algorithm, rest)
    try:
        if isinstance(command, Train | Check) and command.preset is not None:
            command = _parse(algorithm, rest, default=_from_preset(command, algorithm))
        match command:
            case Eval():
                return evaluate_run(command)
            case Plot():
                return plot(command)
            case Record():
                return film(command)
            case Check():
                return check(command)
            case _:
                return train(command, algorithm)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parse(algorithm: type[Agent], arguments: list[str], **default: Any) -> Any:
    """Return the command of a command line; a command as ``default`` has what it leaves out."""
    commands = _commands(algorithm.config_class)
    return tyro.cli(commands, prog="python -m rl", args=arguments, **default)


def _commands(config: type[Config]) -> Any:
    """Return the type that tyro makes the command line of, for the options of one algorithm."""
    commands: Any = Annotated[Train[config], tyro.conf.subcommand("train")]
    for name, kind in (
        ("eval", Eval),
        ("plot", Plot),
        ("record", Record),
        ("check", Check[config]),
    ):
        commands = commands | Annotated[kind, tyro.conf.subcommand(name)]
    return commands


def _from_preset(command: Configured[Any], algorithm: type[Agent]) -> Any:
    """Return a command whose options are those of its preset."""
    file = None if command.preset == "default" else command.preset
    preset = load_preset(algorithm.name, command.env_id, file)
    command = replace(command, config=algorithm.config_class(**preset.options))
    if isinstance(command, Train) and preset.total_timesteps is not None:
        command = replace(command, total_timesteps=preset.total_timesteps)
    return command


if __name__ == "__main__":
    sys.exit(main())
