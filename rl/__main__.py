"""The command line: ``python -m rl train ENV_ID`` and ``python -m rl eval RUN``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Annotated

import torch
import tyro

from .agent import Agent, Log
from .evaluation import Evaluation, evaluate
from .reporting import CSVLog, Table, plot_learning_curve, read_csv
from .trpo import TRPO, TRPOConfig

_CHECKPOINT = "checkpoint.zip"


@dataclass(frozen=True)
class Train:
    """Train TRPO on a gymnasium environment and keep the run in a folder."""

    env_id: tyro.conf.Positional[str]
    """Environment id, for example CartPole-v1."""

    total_timesteps: int = 100_000
    """Environment steps to train for; whole updates are made, so a few more may be taken."""

    out: Path | None = None
    """Run folder, which must not exist; runs/ENV_ID/trpo-seedSEED-TIME by default."""

    eval_episodes: int = 20
    """Episodes of the evaluation after training, with deterministic actions."""

    log_every: int = 1
    """Updates a row of the table."""

    threads: int = 1
    """Threads of torch; more pay off only for wide networks or large batches."""

    progress: bool = True
    """Show a progress bar where the terminal can."""

    config: tyro.conf.OmitArgPrefixes[TRPOConfig] = field(default_factory=TRPOConfig)


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


Command = (
    Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Eval, tyro.conf.subcommand("eval")]
)


def train(command: Train) -> int:
    """Run ``train``; return the exit code."""
    for name in ("total_timesteps", "eval_episodes", "log_every", "threads"):
        if getattr(command, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(command, name)}")
    torch.set_num_threads(command.threads)
    agent = TRPO(command.env_id, **command.config.to_dict())
    out = _make_run_folder(command)
    options = {"env_id": command.env_id, "total_timesteps": command.total_timesteps}
    (out / "config.json").write_text(json.dumps(options | command.config.to_dict(), indent=2))
    table, csv_log = Table(command.log_every), CSVLog(out / "progress.csv")

    def report(_: Agent, log: Log) -> None:
        csv_log(log)
        table(log)

    print(f"TRPO on {command.env_id}, {agent.envs.num_envs} environments, run folder {out}")
    interrupted, progress = False, command.progress and sys.stderr.isatty()
    try:
        agent.learn(command.total_timesteps, progress=progress, callback=report)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: keeping what was learnt so far", file=sys.stderr)
    finally:  # also where an environment raises: what was learnt is kept
        agent.save(out / _CHECKPOINT)
    if agent.iterations:
        columns = read_csv(csv_log.path)
        title = f"TRPO on {command.env_id}, seed {command.config.seed}"
        plot_learning_curve(columns, out / "learning_curve.png", title=title)
        _print_summary(agent, columns, out)
    if interrupted:
        return 130  # as a shell reports an interrupt
    _print_evaluation(evaluate(agent, command.env_id, command.eval_episodes))
    return 0


def evaluate_run(command: Eval) -> int:
    """Run ``eval``; return the exit code."""
    path = command.run / _CHECKPOINT if command.run.is_dir() else command.run
    agent = TRPO.load(path)
    assert agent.env_id is not None  # load without env= made one from its id
    print(f"{path}: TRPO on {agent.env_id} after {agent.num_timesteps:,} steps")
    result = evaluate(
        agent,
        agent.env_id,
        command.episodes,
        seed=command.seed,
        deterministic=not command.stochastic,
    )
    _print_evaluation(result)
    return 0


def _make_run_folder(command: Train) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"trpo-seed{command.config.seed}-{stamp}"
    out = command.out or Path("runs") / command.env_id / name
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise ValueError(
            f"{out} already exists and is kept as it is: choose another --out, or remove it"
        ) from error
    return out


def _print_summary(agent: Agent, columns: dict[str, list[float]], out: Path) -> None:
    kl, delta = max(columns["train/kl_divergence_loss"]), columns["trust/delta"][-1]
    accepted = int(sum(columns["train/is_line_search_success"]))
    seconds = columns["time/time_elapsed"][-1]
    print(f"learning curve  {out / 'learning_curve.png'}")
    print(f"checkpoint      {out / _CHECKPOINT}")
    print(
        f"speed           {columns['time/fps'][-1]:,.0f} steps per second, training included"
        f" ({agent.num_timesteps:,} steps in {seconds:.1f} s)"
    )
    print(
        f"KL              at most {kl:.5f} of delta = {delta:g} in {agent.iterations} updates,"
        f" {accepted} accepted"
    )


def _print_evaluation(result: Evaluation) -> None:
    print(
        f"evaluation      mean return {result.mean:.1f} (standard deviation {result.std:.1f})"
        f" over {len(result.returns)} episodes"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run it; bad input is one line on stderr and exit code 1."""
    command = tyro.cli(Command, prog="python -m rl", args=arguments)
    try:
        return train(command) if isinstance(command, Train) else evaluate_run(command)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
