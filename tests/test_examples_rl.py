"""The whole algorithm in one file."""

import ast
from pathlib import Path

import pytest
import torch

import trustregion
from examples import FOLDER, load
from rl import gae

SOURCE = FOLDER / "trpo_single_file.py"


def test_it_is_short_and_uses_public_names_alone() -> None:
    text = SOURCE.read_text()
    assert len(text.splitlines()) < 200
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith(("trustregion", "rl"))]
    assert [node.module for node in ours] == ["trustregion"]
    assert all(name.name in trustregion.__all__ for node in ours for name in node.names)


def test_its_advantages_are_those_of_the_package() -> None:
    example = load("trpo_single_file")
    torch.manual_seed(0)
    shape = (example.STEPS, example.ENVS)
    terminated, truncated = torch.rand(shape) < 0.1, torch.rand(shape) < 0.1
    valid = torch.ones(shape, dtype=torch.bool)
    rewards, values = torch.randn(shape), torch.randn(example.STEPS + 1, example.ENVS)
    rollout = example.Rollout(values, rewards, rewards, terminated, truncated, valid)
    expected, _ = gae(
        rewards,
        values[:-1],
        values[1:],
        terminated,
        truncated,
        gamma=example.GAMMA,
        gae_lambda=example.LAMBDA,
    )
    # float32 sums in another order
    torch.testing.assert_close(example.advantages_of(rollout, values), expected, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_it_learns() -> None:
    means = load("trpo_single_file").main(updates=8)
    assert means[-1] > 2 * means[0]


def test_boxes_work_too() -> None:
    assert len(load("trpo_single_file").main(env="Pendulum-v1", updates=1)) == 1


@pytest.mark.slow
def test_custom_parts_learn() -> None:
    after = load("own_parts").main(steps=14_000, quiet=True)
    assert after.mean > 12  # of 16; a policy that does not look earns nothing
    assert set(after.lengths) == {16}


@pytest.mark.slow
def test_all_algorithms_run_side_by_side(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    results = load("algorithms").main(steps=2048, seeds=2, plot=plot, quiet=True)
    assert list(results) == ["trpo", "npg", "kl_penalty", "ppo", "vpg"]
    assert all(len(group) == 2 for group in results.values())
    assert 0 < max(result.largest_kl for result in results["trpo"]) <= 0.01
    assert plot.read_bytes().startswith(b"\x89PNG")
