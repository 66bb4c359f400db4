"""Packaged presets, and presets on the command line."""

import json
import re
from importlib import resources

import gymnasium
import pytest
import yaml

from rl import TRPO, PPOConfig, TRPOConfig, load_preset
from rl.algorithms import ALGORITHMS
from rl.run.cli import main

PACKAGED = [
    (file.name.removesuffix(".yml"), env_id)
    for file in resources.files("rl.presets").iterdir()
    if file.name.endswith(".yml")
    for env_id in yaml.safe_load(file.read_text())
]


@pytest.mark.parametrize(("algorithm", "env_id"), PACKAGED)
def test_a_packaged_preset_is_a_config_for_an_environment_of_gymnasium(algorithm, env_id):
    preset = load_preset(algorithm, env_id)
    config = ALGORITHMS[algorithm].config_class(**preset.options)
    config.check_batch()
    assert preset.total_timesteps is not None
    assert env_id in gymnasium.registry


def test_algorithms_of_packaged_presets():
    assert {algorithm for algorithm, _ in PACKAGED} == {"trpo", "npg", "kl_penalty", "ppo"}


def test_an_agent_is_made_from_a_preset():
    agent = TRPO("Pendulum-v1", **load_preset("trpo", "Pendulum-v1").options)
    agent.envs.close()
    assert agent.config.gamma == 0.9


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_our_own_names_come_back_as_they_are(load, algorithm):
    config = ALGORITHMS[algorithm].config_class(hidden=(7, 5), n_envs=3, td_lambda=0.5)
    as_yaml = json.loads(json.dumps(config.to_dict()))  # tuples as lists
    preset = load(as_yaml | {"total_timesteps": 9}, algorithm)
    assert ALGORITHMS[algorithm].config_class(**preset.options) == config
    assert preset.total_timesteps == 9


@pytest.mark.parametrize(
    ("algorithm", "env_id", "words"),
    [
        (
            "trpo",
            "CartPole-v9",
            "presets of trpo: no entry for 'CartPole-v9'; the nearest are CartP",
        ),
        ("vpg", "CartPole-v1", "presets for trpo, npg, kl_penalty, ppo, none for vpg: give a file"),
        ("tpro", "CartPole-v1", "algorithm must be one of trpo, npg, kl_penalty, ppo, vpg, got"),
    ],
)
def test_what_is_not_packaged_is_named(algorithm, env_id, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        load_preset(algorithm, env_id)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Do not draw learning curves, which takes longer than all the rest."""
    monkeypatch.setattr("rl.run.cli.plot_learning_curve", lambda *_, **__: None)


@pytest.fixture
def resolved(tmp_path):
    """Return a function from arguments of train to the options the run folder keeps."""
    file = tmp_path / "my.yml"
    file.write_text(
        "CartPole-v1: {n_envs: 2, n_steps: 16, n_timesteps: 50, gamma: 0.9, normalize: true,"
        " td_lambda: 0.5, hidden: [6, 7]}"
    )

    def resolved(*arguments):
        out = tmp_path / "run"
        command = ["train", "CartPole-v1", "--out", str(out), "--preset", str(file)]
        assert main([*command, "--no-progress", "--eval-episodes", "1", *arguments]) == 0
        return json.loads((out / "config.json").read_text())

    return resolved


def test_a_preset_overrides_defaults(resolved):
    options = resolved()
    expected = TRPOConfig(
        n_envs=2,
        steps_per_update=32,
        gamma=0.9,
        normalise_observations=True,
        normalise_rewards=True,
        td_lambda=0.5,
        hidden=(6, 7),
    ).to_dict() | {"algorithm": "trpo", "env_id": "CartPole-v1", "total_timesteps": 50}
    assert options == expected | {"hidden": [6, 7]}


def test_the_command_line_overrides_a_preset(resolved):
    options = resolved(
        *("--gamma", "0.8", "--no-normalise-rewards", "--td-lambda", "None"),
        *("--hidden", "5", "--total-timesteps", "40"),
    )
    assert options["gamma"] == 0.8
    assert (options["normalise_observations"], options["normalise_rewards"]) == (True, False)
    assert options["td_lambda"] is None
    assert (options["hidden"], options["total_timesteps"], options["n_envs"]) == ([5], 40, 2)


def test_the_command_line_may_say_what_the_default_is(resolved):
    assert resolved("--gamma", "0.99")["gamma"] == 0.99


def test_the_packaged_preset_is_that_of_the_algorithm(tmp_path):
    out = tmp_path / "run"
    command = ["train", "CartPole-v1", "--algo", "ppo", "--preset", "default", "--no-progress"]
    command += ["--total-timesteps", "1", "--eval-episodes", "1", "--out", str(out)]
    assert main(command) == 0
    options = json.loads((out / "config.json").read_text())
    packaged = load_preset("ppo", "CartPole-v1").options
    assert {name: options[name] for name in packaged} == packaged
    assert packaged != {name: PPOConfig().to_dict()[name] for name in packaged}


def test_check_takes_a_preset(tmp_path, capsys):
    file = tmp_path / "my.yml"
    file.write_text("CartPole-v1: {n_envs: 3, steps_per_update: 300, total_timesteps: 5}")
    command = ["check", "CartPole-v1", "--preset", str(file)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "3 x CartPole-v1" in printed
    assert "options         n_envs=3, steps_per_update=300\n" in printed
    assert main([*command, "--steps-per-update", "301"]) == 1  # training would be refused, too
    assert "does not divide by 3" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize(
    ("preset", "words"),
    [("default", "no entry for 'FrozenLake-v1'"), ("absent.yml", "No such file")],
)
def test_a_preset_that_is_not_there_is_one_line(
    tmp_path, monkeypatch, capsys, command, preset, words
):
    monkeypatch.chdir(tmp_path)
    assert main([command, "FrozenLake-v1", "--preset", preset]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


def test_help_names_the_option(capsys):
    for command in ("train", "check"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "--preset" in capsys.readouterr().out
