"""Within a process group of the user's, an agent trains by itself."""

import pytest
import torch.distributed as dist

from agents import SMALL, every_algorithm
from rl import TRPO
from rl.fits import FITS

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture
def a_group(monkeypatch):
    """Begin a group that says it has two processes; return the collectives that were called."""
    called = []

    def collective(*_, **__):
        called.append(1)
        raise AssertionError("a collective was called")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "get_world_size", lambda _=None: 2)
    for name in ("all_reduce", "all_gather", "broadcast", "barrier", "all_gather_object"):
        monkeypatch.setattr(dist, name, collective)
    yield called
    dist.destroy_process_group()


@every_algorithm
def test_an_update_does_not_join(algorithm, a_group):
    algorithm("CartPole-v1", **SMALL).learn(64, progress=False)
    assert not a_group


@pytest.mark.parametrize("fit", FITS)
def test_a_fit_of_the_critic_does_not_join(fit, a_group):
    TRPO("CartPole-v1", critic_fit=fit, **SMALL).learn(64, progress=False)
    assert not a_group


def test_an_optimizer_joins_unless_it_is_told_not_to(a_group):
    """Otherwise the tests above could not fail."""
    agent = TRPO("CartPole-v1", **SMALL).learn(1, progress=False)
    path = agent.training.collector.collect(agent.policy, 16)
    agent.policy_optimizer.process_group = None
    with pytest.raises(AssertionError, match="a collective was called"):
        agent.update(path)
