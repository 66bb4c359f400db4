"""Ctrl-C at any moment of a step: nothing has changed, or the whole step is taken and counted."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

import trustregion
from contract.problem import equal
from interrupted import KINDS, Training

SENDER = """
import os, sys, time
while delay := os.read(0, 100):
    time.sleep(float(delay))
    os.kill(os.getppid(), 2)
"""


def interrupted_at_random(kind, count, seed=0):
    """Steps during which another process sends SIGINT; return how they ended, counted."""
    draw, ends, arrived = random.Random(seed), Counter(), []

    def handler(number, frame):
        arrived.append(number)
        raise KeyboardInterrupt

    own, sender = signal.signal(signal.SIGINT, handler), None
    try:
        training = Training(kind)
        start = time.perf_counter()
        for _ in range(5):
            training.begin_again()
            training.optimizer.step(training.closure)
        length = (time.perf_counter() - start) / 5
        sender = subprocess.Popen([sys.executable, "-c", SENDER], stdin=subprocess.PIPE)
        while ends.total() < count:
            training.begin_again()
            arrived.clear()
            raised = False
            delay = f"{1.1 * length * draw.random()}".encode()
            try:
                os.write(sender.stdin.fileno(), delay)
                training.optimizer.step(training.closure)
            except KeyboardInterrupt:
                raised = True
            try:
                while not arrived:
                    time.sleep(1e-4)
            except KeyboardInterrupt:
                continue  # It came after the step.
            if raised:
                ends[training.harm() or "sound"] += 1
    finally:
        signal.signal(signal.SIGINT, own)
        if sender is not None:
            sender.communicate()
    return ends


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", KINDS)
def test_of_1500_signals_at_random_moments_none_leaves_a_step_half_way(kind):
    ends = interrupted_at_random(kind, 1500)
    assert ends == {"sound": 1500}


HERE, TORCH = Path(trustregion.__file__).parent, Path(torch.__file__).parent
# What a step may leave half-way: what it writes, and the context managers that it is within.
PLACES = (
    *(str(HERE / "optim" / f"{name}.py") for name in ("calls", "objective", "optimizer")),
    str(HERE / "interrupts.py"),
    contextlib.__file__,
    str(TORCH / "utils" / "_contextlib.py"),
    str(TORCH / "autograd" / "grad_mode.py"),
    str(TORCH / "nn" / "attention"),
)


def lines_of_a_step(training, act, places):
    """Take a step; call ``act`` at each line that it comes to, with the line and the pass of it."""
    passes = Counter()

    def within(frame, event, arg):
        if event == "line":
            line = frame.f_code.co_filename, frame.f_lineno
            passes[line] += 1
            act(line, passes[line])
        return within

    def enter(frame, event, arg):
        return within if frame.f_code.co_filename.startswith(places) else None

    own = sys.gettrace()
    sys.settrace(enter)
    try:
        training.optimizer.step(training.closure)
    finally:
        sys.settrace(own)
    return passes


def interrupted_at(training, moments, places):
    """Return the harm of a SIGINT at each of these moments: a line, and the pass of it."""
    harm = {}
    for moment in moments:
        training.begin_again()

        def act(*now, moment=moment):
            if now == moment:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            lines_of_a_step(training, act, places)
        if training.harm():
            harm[moment] = training.harm()
    return harm


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_any_line_of_what_a_step_writes_leaves_nothing_half_way(kind):
    training = Training(kind)
    passes = lines_of_a_step(training, lambda *_: None, PLACES)
    assert equal(training.left(), training.after)
    assert len(passes) > 100
    assert interrupted_at(training, [(line, 1) for line in passes], PLACES) == {}


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_at_the_first_or_last_pass_of_any_line_leaves_no_step_half_way(kind):
    training, everywhere = Training(kind), (str(HERE), str(TORCH), contextlib.__file__)
    passes = lines_of_a_step(training, lambda *_: None, everywhere)
    moments = [(line, n) for line, count in passes.items() for n in {1, count}]
    assert interrupted_at(training, moments, everywhere) == {}
