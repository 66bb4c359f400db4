"""Films that are full, logs without an episode, numbers that are not finite, agents in turn."""

import numpy as np
import pytest

from agents import SMALL
from rl import TRPO, EvaluateBest, Every, StopOnReward
from rl.run.plots import plot_learning_curve, plot_runs
from rl.run.video import record
from toys import Clock, Paid


def test_training_returns_do_not_stop_what_is_evaluated():
    """The agent is evaluated where nothing is paid, and trained where the threshold is passed."""
    poor = Every(150, EvaluateBest(lambda: Paid(0.0), episodes=1))
    for key, stops in (("eval/mean_reward", False), ("rollout/ep_rew_mean", True)):
        agent = TRPO(Paid, **SMALL).learn(400, False, [poor, StopOnReward(1.0, key)])
        assert (agent.num_timesteps < 400) is stops


def test_the_interval_of_a_callback_starts_over_with_another_agent():
    calls = []
    every = Every(100, lambda agent, _: calls.append(agent))
    agents = [TRPO(Clock, **SMALL).learn(300, False, every) for _ in range(2)]
    assert [calls.count(agent) for agent in agents] == [3, 3]


def test_a_video_that_is_full_reports_the_episodes_that_ended(tmp_path, monkeypatch):
    env = Clock(length=4)
    env.render = lambda: np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr("rl.run.video.gymnasium.make", lambda *_, **__: env)
    returns = record(TRPO(Clock, **SMALL), "x", tmp_path / "x.gif", episodes=5, max_frames=10)
    assert returns == [4.0, 4.0]
    assert env.episode == 2


def columns(**changes):
    return {
        "time/total_timesteps": [1.0, 2.0],
        "rollout/ep_rew_mean": [1.0, 2.0],
        "train/kl_divergence_loss": [0.1, 0.2],
    } | changes


@pytest.mark.parametrize("kl", [[float("inf"), 0.1], [float("nan")] * 2])
def test_a_kl_that_is_not_finite_can_be_plotted(kl, tmp_path):
    out = tmp_path / "curve.png"
    plot_learning_curve(columns(**{"train/kl_divergence_loss": kl}), out, title="x")
    assert out.stat().st_size > 1000


def test_runs_without_an_episode_or_a_log_can_be_told(tmp_path):
    for name, text in (("a", "nan"), ("b", "nan")):
        (tmp_path / name).mkdir()
        keys = ",".join(columns())
        (tmp_path / name / "progress.csv").write_text(f"{keys}\n1,{text},0.1\n")
    counts = plot_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "plot.png")
    assert sum(counts.values()) == 2
    (tmp_path / "b" / "progress.csv").write_text("loss\n1\n")
    with pytest.raises(ValueError, match="has no time/total_timesteps"):
        plot_runs([tmp_path / "b"], tmp_path / "plot.png")
