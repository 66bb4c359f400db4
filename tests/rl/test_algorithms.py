"""What holds for every algorithm."""

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from agents import (
    ALGORITHMS,
    MEDIUM,
    SMALL,
    TwoNumbers,
    every_algorithm,
    logs_of,
    same,
    weights,
)
from rl import NPG, PPO, TRPO, VPG, EnvCollector, KLPenalty, Policy, Stepper, evaluate, load
from rl.fits import FITS
from toys import Bandit, Clock, Paid, Slide, vector

BOLD = {
    TRPO: {"delta": 0.1},
    NPG: {"delta": 0.1},
    KLPenalty: {"kl_target": 0.1, "penalty": 1.0},
    PPO: {"lr": 1e-2, "batch_size": 64},
    VPG: {"policy_lr": 0.05},
}


@every_algorithm
@pytest.mark.parametrize("shared", [False, True])
def test_it_learns_a_bandit(algorithm, shared):
    agent = algorithm(vector(Bandit, 4), shared_encoder=shared, **MEDIUM, **BOLD[algorithm])
    logs = logs_of(agent, 2500)
    assert evaluate(agent, vector(Bandit, 4), 8).mean == 1.0
    assert logs[-1]["rollout/ep_rew_mean"] > 0.9 > logs[0]["rollout/ep_rew_mean"]
    for key in ("train/kl_divergence_loss", "train/value_loss", "train/explained_variance"):
        assert all(key in log for log in logs)
    assert all(log["train/kl_divergence_loss"] >= 0 for log in logs)


@every_algorithm
def test_seeds_decide_everything_and_the_global_state_nothing(algorithm):
    agents = []
    for seed, noise in ((3, 1), (3, 2), (4, 2)):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        agents.append(algorithm("CartPole-v1", seed=seed, **MEDIUM).learn(600, progress=False))
        assert torch.equal(torch.get_rng_state(), state)
    a, b, c = map(weights, agents)
    assert same(a, b)
    assert not same(a, c)


@every_algorithm
def test_a_loaded_agent_continues_as_the_saved_one(algorithm, tmp_path):
    agent = algorithm(vector(lambda: Clock(length=3), 4), **MEDIUM).learn(300, progress=False)
    agent.save(tmp_path / "agent.zip")
    loaded = algorithm.load(tmp_path / "agent.zip", vector(lambda: Clock(length=3), 4))
    path = agent.training.collector.collect(agent.policy, 64)
    loaded.generator.set_state(agent.generator.get_state())
    before = weights(agent)
    agent.update(path)
    loaded.update(path)
    assert same(weights(agent), weights(loaded))
    assert not same(before, weights(agent))


@every_algorithm
def test_dummy_transitions_reach_no_update(algorithm):
    """Whatever stands in masked rows, the update is the same bit for bit."""
    agents = [algorithm(vector(lambda: Clock(length=3), 4), **SMALL) for _ in range(2)]
    for agent, garbage in zip(agents, (0.0, 1e6), strict=True):
        agent.learn(1, progress=False)
        path = agent.training.collector.collect(agent.policy, 64)
        assert not path.mask.all()
        path.rewards[~path.mask] = garbage
        path.actions[~path.mask] = int(garbage > 0)
        path.log_prob[~path.mask] = garbage
        agent.update(path)
    assert same(*map(weights, agents))


@every_algorithm
def test_the_device_is_kept_or_replaced(algorithm, tmp_path):
    options = {"steps_per_update": 64, "hidden": (8,), "normalise_observations": True}
    agent = algorithm("CartPole-v1", device="cpu:0", **options).learn(128, progress=False)
    agent.save(tmp_path / "agent.zip")
    for options, expected in (({}, "cpu:0"), ({"device": "cpu"}, "cpu")):
        again = load(tmp_path / "agent.zip", **options)
        assert again.config.device == expected
        again.learn(64, progress=False)


@every_algorithm
def test_the_default_dtype_may_be_float64(algorithm):
    torch.set_default_dtype(torch.float64)
    try:
        for env, options in (("CartPole-v1", {}), ("Pendulum-v1", {"normalise_rewards": True})):
            agent = algorithm(env, normalise_observations=True, **options, **SMALL)
            agent.learn(128, progress=False)
            assert {p.dtype for p in weights(agent)} == {torch.float32}
            agent.predict(agent.layout.space.sample())
    finally:
        torch.set_default_dtype(torch.float32)


@every_algorithm
def test_values_that_are_not_finite_update_nothing(algorithm):
    agent = algorithm(Paid, **SMALL)
    with torch.no_grad():
        agent.critic.linear[0].bias.fill_(torch.nan)
    before = [p.clone() for p in agent.policy.parameters()]
    with pytest.raises(ValueError, match="advantages are not finite, as the critic's values are"):
        agent.learn(64, progress=False)
    assert same(before, list(agent.policy.parameters()))


@every_algorithm
@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_an_update_that_fails_leaves_the_scale_of_rewards(algorithm, failure):
    agent = algorithm(Paid, normalise_rewards=True, **SMALL).learn(64, progress=False)
    kept = {k: x.clone() for k, x in agent.reward_scale.state_dict().items()}
    running = agent.reward_scale.running.clone()
    estimate = agent.estimate

    def failing(path):
        # the scale has moved by now
        assert not torch.equal(agent.reward_scale.moments.mean, kept["moments.mean"])
        raise failure

    agent.estimate = failing
    with pytest.raises(failure):
        agent.learn(64, progress=False)
    assert same([*kept.values()], [*agent.reward_scale.state_dict().values()])
    assert torch.equal(running, agent.reward_scale.running)
    agent.estimate = estimate
    agent.learn(64, progress=False)


@every_algorithm
def test_the_kl_is_that_of_a_policy_whose_distribution_holds_its_parameters(algorithm):
    kls = []
    for copies in (True, False):
        agent = algorithm(Slide, policy=TwoNumbers(copies), **SMALL)
        (log,) = logs_of(agent, 1)
        kls.append(log["train/kl_divergence_loss"])
    assert kls[0] > 1e-5
    assert kls[1] == pytest.approx(kls[0], rel=1e-4)  # float32 in another order


@every_algorithm
def test_a_policy_whose_log_prob_is_a_column_is_refused_with_the_mend(algorithm):
    class Column(TwoNumbers):
        def forward(self, rows):
            return super().forward(rows).base_dist

    agent = algorithm(Slide, policy=Column(copies=True), **SMALL)
    before = weights(agent)
    words = r"log_prob must have shape \(48,\), one per action, got \(48, 1\).*Independent"
    with pytest.raises(ValueError, match=words):
        agent.learn(64, progress=False)
    assert same(before, weights(agent))


@pytest.mark.parametrize(
    ("algorithm", "fit"), [*((a, "adam") for a in ALGORITHMS), *((TRPO, fit) for fit in FITS)]
)
def test_what_is_frozen_stays_and_can_be_saved(algorithm, fit, tmp_path):
    agent = algorithm(Paid, critic_fit=fit, **SMALL)
    layers = [agent.policy.encoder, agent.critic.encoder]
    if algorithm is PPO:
        layers = layers[1:]
    for layer in layers:
        layer.requires_grad_(requires_grad=False)
    frozen = {p: p.clone() for layer in layers for p in layer.parameters()}
    before = weights(agent)
    agent.learn(64, progress=False)
    assert all(torch.equal(p, old) for p, old in frozen.items())
    assert not same(before, weights(agent))
    agent.save(tmp_path / "agent.zip")
    assert same(weights(agent), weights(load(tmp_path / "agent.zip", Paid)))


@every_algorithm
def test_one_step_episodes_are_fine(algorithm):
    agent = algorithm(Bandit, **SMALL)
    logs = logs_of(agent, 64)
    assert [log["rollout/ep_len_mean"] for log in logs] == [1.0] * len(logs)
    assert agent.iterations == 2  # every second step is a dummy one


# -- evaluation mode


class Noisy(Policy):
    """Two layers with something between them that depends on the mode."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(0)
        self.layer = layer
        self.net = nn.Sequential(nn.Linear(2, 8), layer, nn.Tanh(), nn.Linear(8, 1))
        self.modes = []

    def forward(self, rows):
        self.modes.append((self.layer.training, len(rows)))
        return Independent(Normal(self.net(rows), 1.0), 1)


LAYERS = [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(8)]


@pytest.mark.parametrize("layer", LAYERS, ids=["dropout", "batch norm"])
def test_acting_is_in_evaluation_mode_and_leaves_each_mode_as_it_was(layer):
    policy = Noisy(layer())
    policy.net.eval()  # all but one of its modules
    policy.layer.train()
    envs = vector(Slide, 2)
    agent = TRPO(envs, policy=policy, steps_per_update=16)
    state = {k: x.clone() for k, x in policy.state_dict().items()}
    collector = EnvCollector(Stepper(envs), agent.layout, seed=0, generator=torch.Generator())
    collector.collect(policy, 8)
    agent.predict([0.0, 1.0])  # one observation: batch norm needs two to train
    assert agent.predict([0.0, 1.0], True)[0] == agent.predict([0.0, 1.0], True)[0]
    assert policy.modes
    assert not any(training for training, _ in policy.modes)
    assert same([*state.values()], [*policy.state_dict().values()])
    assert [m.training for m in policy.net] == [False, True, False, False]


@every_algorithm
def test_a_policy_with_dropout_trains_and_predicts_the_same_twice(algorithm):
    policy = Noisy(nn.Dropout(0.5))
    agent = algorithm(Slide, policy=policy, **SMALL).learn(64, progress=False)
    assert any(training for training, _ in policy.modes)
    assert evaluate(agent, Slide, 2).returns == evaluate(agent, Slide, 2).returns
