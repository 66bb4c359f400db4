"""Training limits the thread pools and leaves them as it found them."""

from __future__ import annotations

import threading

import pytest
import torch
from threadpoolctl import threadpool_info
from torch import nn

from rl import TRPO, evaluate
from rl.threads import few_threads

SMALL = nn.Linear(4, 4)
WIDE = nn.Linear(256, 256)


def blas() -> list[int]:
    """Return the threads of each BLAS in this process."""
    return [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]


@pytest.fixture(autouse=True)
def _three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("networks", "torch_threads"),
    [
        ((SMALL,), 1),
        ((SMALL, WIDE), 3),  # one large network is enough
        ((nn.Conv2d(1, 1, 3),), 3),  # few parameters, many products
    ],
)
def test_small_networks_run_on_one_thread(networks, torch_threads):
    before = blas()
    with few_threads(*networks):
        assert torch.get_num_threads() == torch_threads
        assert blas() == [1] * len(before)
    assert torch.get_num_threads() == 3
    assert blas() == before


def test_settings_are_put_back_after_an_error_and_after_nested_blocks():
    before = blas()
    with pytest.raises(RuntimeError, match="inside"), few_threads(SMALL), few_threads(SMALL):
        raise RuntimeError("inside")
    assert torch.get_num_threads() == 3
    assert blas() == before


def test_threads_that_train_at_once_leave_the_settings_of_a_new_thread():
    """The later block begins within the first and ends after it."""
    first_is_in, first_is_out = threading.Event(), threading.Event()

    def second():
        first_is_in.wait()
        with few_threads(SMALL):
            second_is_in.set()
            first_is_out.wait()

    second_is_in = threading.Event()
    other = threading.Thread(target=second)
    other.start()
    with few_threads(SMALL):
        first_is_in.set()
        second_is_in.wait()
    first_is_out.set()
    other.join()
    found: list[int] = []
    new = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert found == [3]
    assert torch.get_num_threads() == 3


def test_learn_and_evaluate_compute_on_one_thread_and_callbacks_on_the_users():
    used: list[int] = []
    before = blas()
    agent = TRPO("CartPole-v1", steps_per_update=64, n_envs=2)
    agent.policy.register_forward_hook(lambda *_: used.append(torch.get_num_threads()))

    def callback(_agent, _log):
        assert torch.get_num_threads() == 3
        assert blas() == before

    agent.learn(64, progress=False, callback=callback)
    assert used
    assert set(used) == {1}
    used.clear()
    mode = agent.policy.mode
    agent.policy.mode = lambda rows: used.append(torch.get_num_threads()) or mode(rows)
    evaluate(agent, "CartPole-v1", episodes=1)
    assert set(used) == {1}
    assert torch.get_num_threads() == 3


def test_a_setting_made_while_learning_in_a_callback_counts_afterwards():
    agent = TRPO("CartPole-v1", steps_per_update=64, n_envs=2)
    agent.learn(128, progress=False, callback=lambda *_: torch.set_num_threads(2))
    assert torch.get_num_threads() == 2
