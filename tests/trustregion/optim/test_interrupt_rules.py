"""Which handlers wait for a step, how long, and what they find."""

import signal
import threading
from contextlib import suppress

import pytest
import torch

from interrupted import KINDS, Training
from trustregion.interrupts import deferred, interruptible, poll


class Told(Exception):
    """What a handler of a program raises."""


@pytest.fixture
def handled():
    """The numbers of the signals that reached the handlers of this program, which raise nothing."""
    numbers, owns = [], {}
    for number in (signal.SIGINT, signal.SIGTERM):
        owns[number] = signal.signal(number, lambda n, _: numbers.append(n))
    yield numbers
    for number, own in owns.items():
        signal.signal(number, own)


def send(*numbers):
    for number in numbers:
        signal.raise_signal(number)


@pytest.mark.parametrize("kind", KINDS)
def test_a_handler_that_raises_nothing_lets_the_step_go_on(kind, handled):
    training = Training(kind)
    compute = training.closure

    def closure():
        send(signal.SIGINT, signal.SIGTERM)
        return compute()

    training.optimizer.step(closure)
    calls = training.optimizer.info.evaluations
    assert handled == [signal.SIGINT, signal.SIGTERM] * calls
    assert training.optimizer.info.accepted


def test_signals_wait_in_their_order_for_the_end_and_the_handlers_are_back(handled):
    before, seen = signal.getsignal(signal.SIGINT), []

    @deferred
    def work():
        send(signal.SIGTERM, signal.SIGINT)
        seen.extend(handled)

    work()
    assert seen == []
    assert handled == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_one_signal_more_than_two_runs_at_once_since_something_hangs(handled):
    @deferred
    def work():
        send(signal.SIGINT, signal.SIGINT)
        assert handled == []
        send(signal.SIGINT)
        assert len(handled) == 1

    work()
    assert len(handled) == 3


@pytest.mark.parametrize("where", [poll, lambda: interruptible(list)], ids=["poll", "function"])
def test_what_waits_is_handled_where_it_may_raise(where):
    passed = []

    @deferred
    def work():
        send(signal.SIGINT)
        passed.append("the signal")
        where()
        passed.append("too far")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert passed == ["the signal"]


def test_after_an_interrupt_inside_a_function_of_the_user_signals_wait_again():
    undone = []

    @deferred
    def work():
        try:
            interruptible(lambda: send(signal.SIGINT))
        except KeyboardInterrupt:
            send(signal.SIGINT)
            undone.append(True)
            raise

    with pytest.raises(KeyboardInterrupt):
        work()
    assert undone == [True]


@pytest.mark.parametrize("inner_raises", [False, True])
def test_a_step_within_a_closure_waits_for_itself_alone(handled, inner_raises):
    counts = []

    @deferred
    def inner():
        send(signal.SIGINT)
        counts.append(len(handled))
        if inner_raises:
            raise Told

    @deferred
    def outer():
        with suppress(Told):
            interruptible(inner)
        counts.append(len(handled))
        send(signal.SIGINT)
        counts.append(len(handled))

    outer()
    assert counts == [0, 1, 1]
    assert len(handled) == 2


def test_a_handler_that_the_closure_installs_stays():
    own = signal.getsignal(signal.SIGINT)
    try:
        deferred(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, own)


def test_other_threads_take_steps_without_touching_the_handlers(handled):
    before, seen = signal.getsignal(signal.SIGINT), []
    work = deferred(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_signal_while_another_thread_has_its_turn_ends_the_wait():
    main, other = Training("natural"), Training("natural")
    compute, inside, go_on = other.closure, threading.Event(), threading.Event()

    def slow():
        inside.set()
        go_on.wait(60)
        return compute()

    thread = threading.Thread(target=other.optimizer.step, args=(slow,))
    thread.start()
    inside.wait(60)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            main.optimizer.step(main.closure)
    finally:
        go_on.set()
        thread.join()
        timer.join()
    assert other.optimizer.info.accepted
    with torch.no_grad():
        torch.set_rng_state(main._generator)
    assert not main.harm()
