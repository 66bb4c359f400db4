"""The loop: what it takes, what it says, and what can be exchanged in it."""

import numpy as np
import pytest
import torch
from torch import nn

from agents import MEDIUM, SMALL, logs_of, same, weights
from rl import GAE, PPO, TRPO, VPG, AdamFit, Critic, EnvCollector, TRPOConfig, gae
from toys import Clock, Paid, Slide, vector

# -- learn


def test_dummy_transitions_are_not_counted_as_steps():
    agent = TRPO(vector(lambda: Clock(length=3), 4), **MEDIUM).learn(1, progress=False)
    assert agent.num_timesteps == 4 * 48  # three of every four rows


def test_a_callback_can_stop():
    agent = TRPO("CartPole-v1", **SMALL)
    agent.learn(10_000, progress=False, callback=lambda agent, _: agent.iterations < 2)
    assert agent.iterations == 2


@pytest.mark.parametrize("answer", [None, 0, np.zeros(3), "", []])
def test_only_false_stops(answer):
    agent = TRPO(Clock, **SMALL).learn(128, False, lambda *_: answer)
    assert agent.iterations > 1


@pytest.mark.parametrize("answer", [False, np.False_])
def test_false_stops(answer):
    assert TRPO(Clock, **SMALL).learn(128, False, lambda *_: answer).iterations == 1


@pytest.mark.parametrize("callback", ["progress.csv", 3, EnvCollector, [lambda *_: None, 3]])
def test_a_callback_that_cannot_be_called_is_refused_before_anything_is_spent(callback):
    agent = TRPO(Clock, **SMALL)
    with pytest.raises(
        TypeError, match=r"a callback must be a function|is a class, not a callback"
    ):
        agent.learn(64, False, callback)
    assert agent.training.collector is None
    agent.learn(64, False, [None, lambda *_: None])


def test_learning_continues():
    agent = TRPO("CartPole-v1", **MEDIUM).learn(300, progress=False).learn(300, progress=False)
    straight = TRPO("CartPole-v1", **MEDIUM)
    straight.learn(agent.num_timesteps, progress=False)
    assert same(weights(agent), weights(straight))


def test_the_progress_bar_shows(capsys):
    TRPO("CartPole-v1", **SMALL).learn(300)
    assert "step/s" in capsys.readouterr().err


def test_the_scale_of_rewards_does_not_matter_from_the_first_update_on():
    """A power of two, so that not a bit differs."""
    options = SMALL | {"normalise_rewards": True}
    one, other = (TRPO(lambda f=f: Paid(f), **options) for f in (1.0, 1024.0))
    for agent in (one, other):
        agent.learn(128, progress=False)
    assert same(weights(one), weights(other))
    assert not same(weights(one), weights(TRPO(Paid, **options)))


def test_moments_of_observations_move_after_the_update():
    """So that the ratios of the surrogate are 1 at its start."""
    seen = []

    class Spy(TRPO):
        def update(self, path):
            with torch.no_grad():
                log_prob = self.policy(path.rows).log_prob(path.flat(path.actions))
            seen.append((log_prob - path.flat(path.log_prob)).abs().max().item())
            return super().update(path)

    agent = Spy("CartPole-v1", normalise_observations=True, **SMALL).learn(256, progress=False)
    assert max(seen) < 1e-5  # float32, by numpy and by torch
    assert agent.observation_norm.moments.count == agent.num_timesteps


def test_an_environment_that_goes_bad_leaves_the_agent_intact():
    agent = TRPO(vector(lambda: Clock(length=5, poison=np.nan), 4), **SMALL)
    kept = weights(agent)
    with pytest.raises(ValueError, match="nothing was updated"):
        agent.learn(100, progress=False)
    assert same(kept, weights(agent))


def test_an_environment_may_differentiate():
    class Learner(Clock):
        def step(self, action):
            (torch.ones(1, requires_grad=True) ** 2).sum().backward()
            return super().step(action)

    assert TRPO(Learner, **SMALL).learn(64, progress=False).iterations == 2


# -- predict


def test_predict_takes_one_observation_or_many():
    agent = TRPO("Pendulum-v1", **SMALL)
    action, state = agent.predict(np.zeros(3))
    assert action.shape == (1,)
    assert state is None
    actions, _ = agent.predict(np.zeros((5, 3)), deterministic=True)
    assert actions.shape == (5, 1)
    assert np.ptp(actions) == 0
    assert np.ptp(agent.predict(np.zeros((5, 3)))[0]) > 0
    with pytest.raises(ValueError, match="obs must have shape"):
        agent.predict(np.zeros(4))


def test_a_mask_that_training_would_not_see_is_refused():
    agent = TRPO(Clock, **SMALL)
    with pytest.raises(ValueError, match="action_masks are for environments that give them"):
        agent.predict(np.zeros(2, np.float32), action_masks=np.array([1, 0]))


# -- parts of one's own


def test_a_function_may_estimate_advantages():
    calls = []

    def own(path, values, gamma):
        calls.append((path.version, gamma))
        assert values.now.shape == values.following.shape == path.mask.shape
        ends = path.terminated, path.truncated
        return gae(path.rewards, *values, *ends, gamma=gamma, gae_lambda=0.5)

    agent = TRPO(Clock, advantages=own, gamma=0.8, **SMALL).learn(128, progress=False)
    assert calls == [(i, 0.8) for i in range(agent.iterations)]
    same_by_name = TRPO(Clock, advantages=GAE(0.5), gamma=0.8, **SMALL).learn(128, progress=False)
    assert same(weights(agent), weights(same_by_name))


@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_estimates_of_another_shape_are_named(name):
    def own(path, values, gamma):
        good = torch.zeros_like(path.rewards)
        return (good[0], good) if name == "advantages" else (good, path.flat(good))

    agent = TRPO(vector(lambda: Clock(length=9), 4), advantages=own, **SMALL)
    before = weights(agent)
    words = rf"{name} must be one per step, shape \(16, 4\), got \(\d+,\)"
    with pytest.raises(ValueError, match=words):
        agent.learn(64, progress=False)
    assert same(before, weights(agent))


def test_the_critic_may_be_fitted_to_lambda_returns():
    """Of trace 0 they are the one-step targets, whatever the advantages are."""
    agent = TRPO("CartPole-v1", td_lambda=0.0, advantages="monte_carlo", **SMALL)
    plain = TRPO("CartPole-v1", advantages="monte_carlo", **SMALL)
    path = agent.learn(1, progress=False).training.collector.collect(agent.policy, 16)
    found, other = agent.estimate(path), plain.estimate(path)
    values = path.values(agent.critic)
    target = path.rewards + 0.99 * torch.where(path.terminated, 0.0, values.following)
    torch.testing.assert_close(found.returns, target.detach(), rtol=1e-5, atol=1e-5)
    plain.critic.load_state_dict(agent.critic.state_dict())
    other = plain.estimate(path)
    assert torch.equal(found.advantages, other.advantages)
    assert torch.equal(other.returns, other.advantages + other.values)
    assert not torch.equal(found.returns, other.returns)


class Nothing:
    """A fit that leaves the critic as it is, and says so."""

    def __init__(self):
        self.calls = []

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    def __call__(self, task, optimizer):
        shapes = task.rows.shape, task.returns.shape
        self.calls.append((task.critic, task.parameters, optimizer, *shapes, task.generator))
        return -7.0


@pytest.mark.parametrize("algorithm", [TRPO, VPG])
def test_a_fit_of_ones_own_is_called_with_what_it_needs(algorithm):
    own = Nothing()
    agent = algorithm(vector(lambda: Clock(length=3), 4), critic_fit=own, **SMALL)
    before = [p.clone() for p in agent.critic.parameters()]
    (log,) = logs_of(agent, 1)
    assert log["train/value_loss"] == -7.0
    ((critic, parameters, optimizer, rows, returns, generator),) = own.calls
    assert critic is agent.critic
    assert [id(p) for p in parameters] == [id(p) for p in agent.critic.parameters()]
    assert optimizer is agent.critic_optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert (rows, returns) == ((48, 2), (48,))  # without the dummy steps
    assert generator is agent.generator
    assert same(before, list(agent.critic.parameters()))


def test_what_policy_and_critic_share_is_not_fitted_to_returns():
    own = Nothing()
    agent = TRPO(Clock, shared_encoder=True, critic_fit=own, **SMALL).learn(1, progress=False)
    (call,) = own.calls
    assert [id(p) for p in call[1]] == [id(p) for p in agent.critic.linear.parameters()]


def test_a_collector_of_ones_own_with_another_signal_reaches_the_update():
    class Costly(EnvCollector):
        def signals(self, step):
            return super().signals(step) | {"cost": 10 * step.rewards}

        def __len__(self):
            return 0  # it is one nevertheless

    seen = []

    class Lagrangian(TRPO):
        """Estimates advantages of reward minus cost; costs are worth 0.05 each."""

        def estimate(self, path):
            seen.append(path.signals["cost"][path.mask].unique().tolist())
            return super().estimate(path.with_reward(path.rewards - 0.05 * path.signals["cost"]))

    agent = Lagrangian(Clock, collector=Costly, **SMALL)
    assert agent.learn(128, progress=False).iterations == 3
    assert seen == [[10.0]] * 3
    collector = agent.training.collector
    assert isinstance(collector, Costly)
    assert agent.learn(1, progress=False).training.collector is collector


@pytest.mark.parametrize("algorithm", [TRPO, VPG])
def test_the_objective_can_be_overridden(algorithm):
    """The other way round, the policy unlearns what it would learn."""

    class Reversed(algorithm):
        calls = 0

        def objective(self, path, advantages):
            self.calls += 1
            return super().objective(path, -advantages)

    moves = []
    for kind in (algorithm, Reversed):
        agent = kind("CartPole-v1", **MEDIUM)
        before = torch.cat([p.detach().flatten().clone() for p in agent.policy.parameters()])
        agent.learn(1, progress=False)
        moves.append(torch.cat([p.detach().flatten() for p in agent.policy.parameters()]) - before)
    assert agent.calls == 1
    assert torch.cosine_similarity(*moves, dim=0) < -0.99


def test_a_critic_of_another_shape_is_named():
    class Column(nn.Linear):
        def __init__(self):
            super().__init__(2, 1)

    with pytest.raises(ValueError, match="the critic must return one value per row"):
        TRPO(Clock, critic=Column(), **SMALL).learn(64, progress=False)
    with pytest.raises(ValueError, match="the critic has no parameters"):
        TRPO(Clock, critic=nn.Flatten(0), **SMALL)


def test_a_critic_is_valued_in_evaluation_mode_and_fitted_in_its_own():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
            self.modes = []

        def forward(self, rows):
            self.modes.append((self.net[1].training, rows.ndim))
            return self.net(rows.flatten(0, -2)).reshape(rows.shape[:-1])

    critic = Wide()
    TRPO(Slide, critic=critic, critic_fit=AdamFit(epochs=1), **SMALL).learn(1, progress=False)
    assert (False, 3) in critic.modes  # all states of a path
    assert (True, 2) in critic.modes  # rows of the fit
    assert (True, 3) not in critic.modes
    assert critic.net[1].training


# -- what is refused, in words


@pytest.mark.parametrize("arguments", [("MlpPolicy", "CartPole-v1"), (Clock, "CartPole-v1", 3)])
@pytest.mark.parametrize("algorithm", [TRPO, PPO])
def test_a_policy_by_name_is_answered(algorithm, arguments):
    words = (
        "takes the environment as its only positional argument.*no policy name.*policy= a module"
    )
    with pytest.raises(TypeError, match=words):
        algorithm(*arguments)


@pytest.mark.parametrize("n", [1, 8])
def test_n_envs_beside_an_environment_that_was_passed_is_refused(n):
    envs = vector(Clock, 3)
    with pytest.raises(ValueError, match=rf"n_envs={n}, but the environment that was passed is 3"):
        TRPO(envs, n_envs=n)
    assert TRPO(envs, n_envs=3, steps_per_update=6).config.n_envs == 3
    assert TRPO(envs, steps_per_update=6).config.n_envs == 3
    with pytest.raises(ValueError, match="n_envs=2, but the environment that was passed is 1"):
        TRPO(Clock(), n_envs=2)
    assert TRPO(Clock(), n_envs=np.int64(1)).config.n_envs == 1
    assert not envs.closed


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_a_clear_error(device):
    with pytest.raises(ValueError, match=f"cannot compute on device='{device}'.*such as 'cpu'"):
        TRPO("CartPole-v1", device=device)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_envs": 7}, "does not divide by 7 environments: try 2044 or 2051"),
        ({"steps_per_update": 8}, "too few for 8 environments: at least 16"),
        ({"steps_per_update": 3}, "try 16"),
        ({"detla": 0.1}, "no option 'detla': did you mean 'delta'"),
    ],
)
def test_options_that_do_not_fit_the_environments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TRPO("CartPole-v1", **options)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="total_timesteps must be positive, got 0"):
        TRPO("CartPole-v1", **SMALL).learn(0)


def test_a_critic_that_diverges_is_named():
    agent = TRPO("CartPole-v1", critic_fit=AdamFit(lr=1e30), **MEDIUM)
    with pytest.raises(ValueError, match=r"the critic's loss is .* Lower lr of critic_fit"):
        agent.learn(2000, progress=False)
    assert all(p.isfinite().all() for p in weights(agent))


def test_a_schedule_that_is_not_asked_for_keeps_its_start():
    agent = TRPO(Clock, **SMALL)
    agent.learn(128, False, lambda *_: False)  # stops after one of two updates
    assert agent.progress == agent.num_timesteps / 128 < 1
    assert agent.scheduled(3.0, None) == 3.0
    assert agent.scheduled(3.0, 1.0) == 3.0 - 2.0 * agent.progress
    assert isinstance(agent.critic, Critic)
    assert isinstance(agent.config, TRPOConfig)


def test_signals_without_a_reward_are_named():
    class Without(EnvCollector):
        def signals(self, step):
            return {"cost": step.rewards}

    agent = TRPO(Clock, collector=Without, **SMALL)
    with pytest.raises(ValueError, match=r"signals\(\) must return 'reward', got cost"):
        agent.learn(64, progress=False)
