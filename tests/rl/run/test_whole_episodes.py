"""Evaluation plays whole episodes, fairly, and not where the agent learns."""

import gymnasium
import pytest
from gymnasium.vector import SyncVectorEnv

from agents import SMALL, same, weights
from rl import TRPO, EvaluateBest, evaluate
from toys import Clock, vector


def test_evaluation_plays_whole_episodes_fairly():
    agent = TRPO(vector(lambda: Clock(length=3), 4), **SMALL)
    lengths = iter([2, 5, 9])
    envs = SyncVectorEnv([lambda: Clock(length=next(lengths))] * 3)
    result = evaluate(agent, envs, episodes=7)
    # three, two and two episodes of the three environments
    assert sorted(result.lengths) == [2, 2, 2, 5, 5, 9, 9]
    assert sorted(result.returns) == [2, 2, 2, 5, 5, 9, 9]
    assert result.mean == pytest.approx(34 / 7)
    with pytest.raises(ValueError, match="episodes"):
        evaluate(agent, envs, episodes=0)


class Generous(SyncVectorEnv):
    """Pays for the dummy step too, which the interface does not forbid."""

    def step(self, actions):
        resetting = self._autoreset_envs.copy()
        observation, reward, *rest = super().step(actions)
        return observation, reward + 100 * resetting, *rest


def test_rewards_of_dummy_steps_are_in_no_return():
    envs = Generous([lambda: Clock(length=3)] * 4)
    agent = TRPO(envs, **SMALL).learn(1, progress=False)
    assert set(agent.training.collector.episodes.returns) == {3.0}
    assert evaluate(agent, Generous([lambda: Clock(length=3)] * 2), 6).returns == (3.0,) * 6


def test_evaluating_in_the_environment_that_is_learnt_in_is_refused():
    env = Clock(length=4)
    agent = TRPO(env, steps_per_update=64, hidden=(8,))
    for source in (env, gymnasium.Wrapper(env), agent.envs):
        with pytest.raises(ValueError, match="environments the agent trains in"):
            evaluate(agent, source, 1)
        with pytest.raises(ValueError, match="environments the agent trains in"):
            agent.learn(64, False, EvaluateBest(source, episodes=1))
    assert evaluate(agent, Clock(length=4), 1).lengths == (4,)


def test_drawing_actions_elsewhere_does_not_change_training():
    plain = TRPO("CartPole-v1", **SMALL).learn(300, progress=False)
    watched = TRPO("CartPole-v1", **SMALL)
    evaluate(watched, "CartPole-v1", 3, deterministic=False)
    watched.learn(300, progress=False)
    assert same(weights(plain), weights(watched))
