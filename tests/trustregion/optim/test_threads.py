"""Steps in several threads: process-wide settings, random numbers and trials do not mix."""

import threading

import pytest
import torch
from torch import nn

from interrupted import process_settings
from optimizers import natural, newton
from problems import closure_of, network
from trustregion import Status


class Interrupted(Exception):
    pass


def steps(index, model, failing, outcomes):
    """Ten steps of an optimizer of this thread's own, whose 7th call may fail."""
    compute = closure_of(model, X, Y)
    calls = []

    def closure():
        calls.append(1)
        if failing and len(calls) == 7:
            raise Interrupted
        # They hold until the last of the overlapping steps has ended.
        assert process_settings()[1:5] == (False, False, False, True)
        return compute()

    optimizer = (natural if index % 2 else newton)(model.parameters())
    try:
        for _ in range(10):
            optimizer.step(closure)
            outcomes.append(optimizer.info.status)
    except Interrupted as error:
        outcomes.append(error)


DRAW = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 4, generator=DRAW), torch.randint(3, (64,), generator=DRAW)


@pytest.mark.parametrize("failing", [(), (3,), (0, 1, 2, 3)])
def test_steps_in_four_threads_leave_the_settings_and_repeat_their_calls(failing):
    before = process_settings()
    outcomes = [[] for _ in range(4)]
    # Only steps take turns: a model that is initialized meanwhile would draw between their calls.
    models = [network(4, 16, 3, nn.Dropout(0.5)) for _ in outcomes]
    threads = [
        threading.Thread(target=steps, args=(i, models[i], i in failing, outcomes[i]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process_settings() == before
    for index, outcome in enumerate(outcomes):
        assert Status.NOT_REPRODUCIBLE not in outcome
        if index in failing:
            assert isinstance(outcome[-1], Interrupted)
        else:
            assert len(outcome) == 10
            assert Status.ACCEPTED in outcome


@pytest.mark.parametrize("kind", [natural, newton])
def test_inside_a_closure_the_settings_are_those_of_a_step_and_outside_they_are_back(kind):
    before, seen = process_settings(), []
    model = network(4, 8, 3)
    compute = closure_of(model, X, Y)

    def closure():
        seen.append(process_settings())
        return compute()

    kind(model.parameters()).step(closure)
    first, *trials = seen
    assert first[0] is before[0]  # The first call validates the arguments of distributions.
    assert trials
    for now in trials:
        assert now[0] is False
        assert now[1:7] == first[1:7]
    assert first[1:4] == (False, False, False)
    assert first[4] is True
    assert process_settings() == before
