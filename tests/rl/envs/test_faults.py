"""Environments that raise, die, hang or answer nonsense: one error each, and nothing is left."""

import ctypes
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from agents import same, weights
from rl import TRPO, EnvironmentFault, make_envs
from rl.envs.copies import Copies
from rl.envs.faults import Failure
from rl.envs.stand import Spaces
from rl.envs.workers import _in_time, in_processes
from toys import Clock

pytestmark = pytest.mark.timeout(60)  # whatever hangs, fails
BOTH = pytest.mark.parametrize("how", ["sync", "async"])
NOTHING = np.zeros(2, int)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not multiprocessing.active_children()


class Faulty(Clock):
    """Does something at one place of its life, if the seed of its last reset is 1."""

    def __init__(self, where, fault):
        super().__init__()
        self.where, self.fault, self.seed = where, fault, None

    def at(self, where):
        if where == self.where and self.seed in (1, None):
            self.fault()

    def reset(self, *, seed=None, options=None):
        self.seed = self.seed if seed is None else seed
        self.at("reset")
        return super().reset(seed=seed)

    def step(self, action):
        if self.time == 1:
            self.at("step")
        return super().step(action)

    def close(self):
        if self.seed is not None:
            self.at("close")


class Two(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raises(error):
    def fault():
        raise error

    return fault


RAISED = {
    "KeyError: 'map'": raises(KeyError("map")),
    "ValueError: too fast": raises(ValueError("too fast")),
    "Two: 1 and 2": raises(Two(1, 2)),
    "RuntimeError: <function": raises(RuntimeError(lambda: "it cannot be pickled")),
}
DEATHS = {
    "its process ended with exit code 3": lambda: os._exit(3),
    "its process was killed by SIGSEGV": lambda: (faulthandler.disable(), ctypes.string_at(0)),
    "its process was killed by SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SystemExit: 3": lambda: sys.exit(3),
}


def _two_steps(envs):
    envs.reset(seed=0)
    envs.step(NOTHING)
    envs.step(NOTHING)


def check(envs, where, words):
    """Step until the second environment fails, and see that everything goes on after a reset."""
    place = "step 1 of episode 1 from seed 1, on action 0"
    place = "the reset of episode 1 from seed 1" if where == "reset" else place
    with pytest.raises(EnvironmentFault) as caught:
        _two_steps(envs)
    assert str(caught.value).startswith(f"environment 1 failed at {place}: {words}")
    assert caught.value.index == 1
    assert envs.reset(seed=4)[0].tolist()[1] == [0, 0]  # it is a new one
    assert envs.step(NOTHING)[0][:, 1].tolist() == [1, 1]
    assert envs.renewals.tolist() == [0, 1]
    envs.close()
    return caught.value


@BOTH
@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize("words", RAISED)
def test_what_an_environment_raises_is_one_error_that_says_where(how, where, words):
    error = check(make_envs(lambda: Faulty(where, RAISED[words]), 2, how), where, words)
    assert error.trace.startswith("Traceback")
    assert "in fault\n" in error.trace
    if how == "sync":
        assert type(error.__cause__).__name__ == words.partition(":")[0]
    else:
        assert error.trace.strip() in error.__notes__[0]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
@pytest.mark.parametrize("where", ["reset", "step"])
@pytest.mark.parametrize("words", DEATHS)
def test_a_process_that_dies_is_one_error_that_says_where(where, words):
    check(make_envs(lambda: Faulty(where, DEATHS[words]), 2, "async"), where, words)


def hang():
    time.sleep(1e6)


@pytest.mark.parametrize("where", ["reset", "step"])
def test_a_process_that_hangs_is_ended_after_a_time(where):
    envs = make_envs(lambda: Faulty(where, hang), 2, "async", env_timeout=0.5)
    check(envs, where, "its process gave no answer for 0.5 s and was ended (env_timeout)")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (hang, r"its process gave no answer for 0.2 s"),
        (lambda: os._exit(3), "its process ended with exit code 3"),
        (raises(KeyError("map")), "KeyError: 'map'"),
    ],
)
def test_an_environment_that_cannot_be_made(fault, words):
    with pytest.raises(EnvironmentFault, match=f"environment 0 failed when it was made: {words}"):
        make_envs(lambda: fault() or Clock(), 2, "async", env_timeout=0.2 if fault is hang else 60)


def test_an_environment_that_cannot_be_made_here():
    makers = iter([Clock, raises(KeyError("map"))])
    with pytest.raises(EnvironmentFault, match="environment 1 failed when it was made: KeyError"):
        make_envs(lambda: next(makers)(), 2, "sync")


def test_all_that_fail_are_named():
    envs = make_envs(lambda: Faulty("reset", raises(KeyError)), 3, "sync")
    with pytest.raises(EnvironmentFault, match="environment 0 failed") as caught:
        envs.reset()
    assert caught.value.__notes__ == ["Others failed, too: 1, 2."]


@pytest.mark.parametrize(
    ("how", "fault", "words"),
    [
        ("sync", raises(KeyError("map")), "KeyError: 'map'"),
        ("async", raises(KeyError("map")), "KeyError: 'map'"),
        ("async", lambda: os._exit(3), "its process ended with exit code 3"),
        ("async", hang, "its process gave no answer for 0.2 s"),
    ],
)
def test_a_close_that_fails_is_a_warning_and_closes_the_others(how, fault, words):
    closed = []
    envs = make_envs(lambda: Faulty("close", lambda: closed.append(0) or fault()), 2, how)
    envs.reset(seed=1)
    envs.limit = 0.2 if fault is hang else 60.0
    with pytest.warns(RuntimeWarning, match=f"environment 0 failed to close: {words}"):
        envs.close()
    assert envs.closed
    assert len(closed) == (1 if how == "sync" else 0)  # the second one does nothing there


def test_without_a_reset_nothing_goes_on():
    envs = make_envs(lambda: Faulty("step", raises(KeyError)), 2, "async")
    envs.reset(seed=0)
    envs.step(NOTHING)
    for words in ("KeyError", "it failed before, or was interrupted: reset the environments"):
        with pytest.raises(EnvironmentFault, match=words):
            envs.step(NOTHING)
    envs.close()


@BOTH
def test_copies_are_asked_one_by_one(how):
    envs = make_envs(lambda: Clock(length=2), 2, how)
    envs.reset(seed=[7, 9])
    assert envs.call("np_random_seed") == envs.get_attr("np_random_seed") == (7, 9)
    assert envs.apply(lambda env, x: (env.unwrapped.length, x), "ab") == [(2, "a"), (2, "b")]
    with pytest.raises(ValueError, match="there must be 2 arguments, got 1"):
        envs.apply(print, [1])
    envs.autoreset = np.array([False, True])  # as after an episode that ended elsewhere
    observations, rewards, *_ = envs.step(NOTHING)
    assert (observations.tolist(), rewards.tolist()) == ([[0, 1], [1, 0]], [1.0, 0.0])
    assert envs.step(NOTHING)[2].tolist() == [True, False]
    observations, _ = envs.reset(options={"reset_mask": np.array([False, True])})
    assert observations.tolist() == [[0, 2], [2, 0]]
    assert envs.autoreset.tolist() == [True, False]
    with pytest.raises(EnvironmentFault, match=r"environment 0 failed in nothing\(\): Attribute"):
        envs.call("nothing")
    envs.close()
    with pytest.raises(ValueError, match="the environments are closed"):
        envs.step(NOTHING)


# -- answers


class Answers(Clock):
    def __init__(self, space, observation, **others):
        super().__init__()
        self.observation_space, self.observation = space, observation
        self.others = {"reward": 1.0, "terminated": False} | others

    def reset(self, **arguments):
        super().reset(**arguments)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation, self.others["reward"], self.others["terminated"], False, {}


VECTOR, BYTES = Box(-9, 9, (3,), np.float32), Box(0, 255, (2,), np.uint8)
NESTED = Dict(a=Discrete(3), b=Tuple((VECTOR, BYTES)))
SHAPE = r"must have shape \(3,\), as its space says"
WRONG = [
    (VECTOR, np.float32(1), rf"observation {SHAPE}, got \(\)"),
    (VECTOR, np.zeros(1, np.float32), rf"observation {SHAPE}, got \(1,\)"),
    (VECTOR, np.zeros((1, 3), np.float32), rf"observation {SHAPE}, got \(1, 3\)"),
    (VECTOR, np.zeros(4, np.float32), rf"observation {SHAPE}, got \(4,\)"),
    (VECTOR, np.array(["a"] * 3), r"observation must be numbers of shape \(3,\), got array"),
    (VECTOR, np.zeros(3, complex), r"observation must be numbers of shape \(3,\), got array"),
    (VECTOR, None, r"observation must be numbers of shape \(3,\), got None"),
    (VECTOR, [0, np.nan, 0], r"observation is NaN or infinite: \[0.0, nan, 0.0\]"),
    (VECTOR, [0, 0, 1e39], r"observation is NaN or infinite: \[0.0, 0.0, inf\]"),
    (BYTES, [0.5, 1.0], "observation must be of type uint8, as its space says, got float64"),
    (BYTES, [0, 256], "observation must be of type uint8, as its space says, got int64"),
    (BYTES, [np.nan, 1], "observation must be of type uint8, as its space says, got float64"),
    (Discrete(3), [1], r"observation must have shape \(\), as its space says, got \(1,\)"),
    (Discrete(3), 1.5, "observation must be of type int64, as its space says, got float64"),
    (NESTED, {"a": 1, "b": (np.zeros(3), [0, -1])}, r"observation\['b'\]\[1\] must be of type"),
    (NESTED, {"a": 1, "b": (np.zeros(3),)}, r"observation\['b'\]\[1\] is missing from {'a'"),
    (NESTED, {"a": 1, "b": (np.full(3, np.inf), [0, 1])}, "observation is NaN or infinite"),
    (NESTED, np.zeros(3), r"observation\['a'\] is missing from array"),
]


@BOTH
@pytest.mark.parametrize(("space", "observation", "words"), WRONG)
def test_observations_that_are_not_of_their_space(how, space, observation, words):
    if how == "async" and space is not NESTED and observation is not None:
        return  # both write rows in the same way; a process each takes time
    envs = make_envs(lambda: Answers(space, observation), 2, how)
    envs.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=rf"environment 0 failed at step 0 .*: {words}"):
        envs.step(NOTHING)
    envs.close()


@pytest.mark.parametrize(
    ("space", "observation", "taken"),
    [
        (VECTOR, np.array([0.1, 2, 3]), np.float32([0.1, 2, 3])),
        (VECTOR, [1, 2, 3], [1, 2, 3]),
        (VECTOR, [1e20, -1e20, 3e38], np.float32([1e20, -1e20, 3e38])),  # its square overflows
        (BYTES, [1, 255], [1, 255]),
        (BYTES, np.array([1.0, 2.0]), [1, 2]),
        (Discrete(3), np.int32(2), 2),
        (Discrete(3), True, 1),
    ],
)
def test_observations_of_another_type_that_lose_nothing(space, observation, taken):
    envs = make_envs(lambda: Answers(space, observation), 2, "sync")
    envs.reset(seed=0)
    found = envs.step(NOTHING)[0]
    assert found.dtype == space.dtype
    assert np.array_equal(found, [taken, taken])


@BOTH
@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"reward": np.nan}, "reward is NaN or infinite: nan"),
        ({"reward": -np.inf}, "reward is NaN or infinite: -inf"),
        ({"reward": None}, "ValueError: reward must be one number, got None"),
        ({"terminated": None}, "ValueError: terminated must be one number, got None"),
        ({"terminated": np.nan}, "ValueError: terminated must be True or False"),
        ({"terminated": [True, False]}, "ValueError: terminated must be one number"),
    ],
)
def test_rewards_and_flags_that_are_none(how, others, words):
    envs = make_envs(lambda: Answers(VECTOR, np.zeros(3), **others), 2, how)
    envs.reset(seed=0)
    with pytest.raises(EnvironmentFault, match=f"environment 0 failed at step 0 .*: {words}"):
        envs.step(NOTHING)
    envs.close()


# -- restarts


@BOTH
@pytest.mark.parametrize("kind", ["raises", "answers NaN", "dies"])
def test_on_request_a_fault_ends_an_episode_as_truncated(how, kind):
    if how == "sync" and kind == "dies":
        return
    fault = {"raises": raises(KeyError("map")), "dies": lambda: os._exit(3)}.get(kind, lambda: None)

    class Sometimes(Faulty):
        def _observation(self):
            bad = kind == "answers NaN" and self.time == 2 and self.seed == 1
            return np.full(2, np.nan, np.float32) if bad else super()._observation()

    envs = make_envs(lambda: Sometimes("step", fault), 2, how, on_env_error="restart")
    envs.reset(seed=0)
    first = [envs.step(NOTHING)]
    assert first[0][0].tolist() == [[0, 1], [0, 1]]
    with pytest.warns(RuntimeWarning, match="environment 1 failed at step 1 of episode 1 from se"):
        observations, rewards, terminated, truncated, infos = envs.step(NOTHING)
    assert observations.tolist() == [[0, 2], [0, 1]]  # the last one before the fault
    assert (rewards.tolist(), infos) == ([1.0, 0.0], {})
    assert (terminated.tolist(), truncated.tolist()) == ([False] * 2, [False, True])
    assert envs.autoreset.tolist() == [False, True]
    observations, rewards, terminated, truncated, _ = envs.step(NOTHING)
    assert observations.tolist() == [[0, 3], [0, 0]]  # the first one of a new environment
    assert (rewards.tolist(), truncated.tolist()) == ([1.0, 0.0], [False, False])
    assert envs.renewals.tolist() == [0, 1]
    seeds = envs.call("np_random_seed")
    assert seeds == (0, np.random.SeedSequence((1, 1)).generate_state(1)[0])
    assert envs.step(NOTHING)[0].tolist() == [[1, 0], [0, 1]]
    envs.close()


def test_a_reset_that_fails_is_repeated_from_another_seed():
    envs = make_envs(lambda: Faulty("reset", raises(KeyError("a"))), 2, on_env_error="restart")
    with pytest.warns(RuntimeWarning, match="at the reset of episode 1 from seed 1: KeyError: 'a'"):
        observations, _ = envs.reset(seed=0)
    assert observations.tolist() == [[0, 0]] * 2
    assert envs.renewals.tolist() == [0, 1]
    assert envs.get_attr("np_random_seed")[1] not in (0, 1)


def test_faults_without_a_good_step_in_between_are_raised_in_the_end():
    envs = make_envs(lambda: Faulty("reset", raises(KeyError)), 2, "sync", on_env_error="restart")
    with (
        pytest.warns(RuntimeWarning, match="It is recreated") as warned,
        pytest.raises(EnvironmentFault, match="environment 0 failed") as caught,
    ):
        envs.reset()
    assert len(warned) == 3
    assert "recreated 3 times without a good step in between" in caught.value.__notes__[0]


def test_good_steps_count_against_faults():
    """Each episode ends in a fault, after one good step."""
    envs = make_envs(lambda: Faulty("step", raises(KeyError)), 1, "sync", on_env_error="restart")
    envs.reset()
    with pytest.warns(RuntimeWarning, match="It is recreated") as warned:
        truncated = [envs.step(NOTHING[:1])[3][0] for _ in range(15)]
    assert truncated == [False, True, False] * 5
    assert len(warned) == 5
    assert envs.renewals.tolist() == [5]


@pytest.mark.parametrize("on_env_error", ["raise", "restart"])
def test_an_agent_survives_the_death_of_a_worker(on_env_error):
    envs = make_envs(Clock, 2, "async", on_env_error=on_env_error)
    agent = TRPO(envs, steps_per_update=16, hidden=(4,))
    for updates in (1, 2):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        if on_env_error == "restart":
            with pytest.warns(
                RuntimeWarning, match="failed at .* its process was killed by SIGKIL"
            ):
                agent.learn(16, progress=False)
        else:
            before = weights(agent)
            with pytest.raises(EnvironmentFault, match=r"environment [01] failed at .* SIGKILL"):
                agent.learn(16, progress=False)
            assert same(before, weights(agent))
            agent.learn(16, progress=False)
        assert agent.iterations >= updates
    assert envs.renewals.sum() == 2
    envs.close()


# -- processes


def test_time_in_which_this_process_was_stopped_does_not_count():
    asked = []

    def ready(answers):
        return lambda seconds: asked.append(seconds) or next(answers)

    assert not _in_time(ready(iter([False] * 3)), 2.5)
    assert _in_time(ready(iter([False, True])), 2.5)
    assert not _in_time(ready(iter([False])), 0.0)
    assert asked == [1.0, 1.0, 0.5, 1.0, 1.0, 0.0]


def test_copies_that_hang_together_share_their_time():
    class Hanging:
        idle, limits = True, []

        def send(self, command, arguments):
            self.idle = False

        def receive(self, limit):
            self.limits.append(limit)
            raise Failure("no answer", late=True)

    spaces = Spaces(VECTOR, Discrete(2), {}, None)
    hands = [Hanging() for _ in range(3)]
    envs = Copies(hands, spaces, np.zeros((3, 3)), "async", 7.0, "raise")
    with pytest.raises(EnvironmentFault):
        envs.reset()
    assert Hanging.limits == [7.0, 0.0, 0.0]


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_signals_are_for_the_process_that_steps():
    """They reach all processes of a terminal or a job; the workers go on."""
    envs = make_envs(Clock, 2, "async")
    envs.reset(seed=0)
    for process in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
    assert envs.step(NOTHING)[1].tolist() == [1, 1]
    envs.close()


def test_an_interrupted_step_can_be_closed_or_reset():
    class Slow(Clock):
        def step(self, action):
            time.sleep(0.3 * float(action))
            return super().step(action)

    def interrupt(*_):
        raise KeyboardInterrupt

    envs = make_envs(Slow, 2, "async")
    envs.reset(seed=0)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for after in (lambda: envs.reset(seed=0), envs.close):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                envs.step(np.array([0, 1]))
            after()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert envs.renewals[1] == 1


def test_environments_that_nobody_closes_are_ended():
    for _ in range(2):
        make_envs(Clock, 2, "async").reset(seed=0)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="files are counted in /proc")
def test_neither_files_nor_processes_are_left():
    counts = []
    for _ in range(4):
        envs = make_envs(lambda: Faulty("step", lambda: os._exit(3)), 2, "async")
        check(envs, "step", "its process ended with exit code 3")
        counts.append(len(os.listdir("/proc/self/fd")))
    assert counts[1:] == counts[1:2] * 3  # the first time leaves what all share


PARENT = """
import os, re, sys, time
import numpy as np
from rl import make_envs
from toys import Clock

class Slow(Clock):
    def step(self, action):
        print("started", flush=True)
        if SECONDS == "never":  # a loop in C, which holds the interpreter's lock
            re.match("(a+)+$", "a" * 70 + "b")
        time.sleep(SECONDS)
        return super().step(action)

    def close(self):
        print("closed", flush=True)

envs = make_envs(Slow, 2, "async")
envs.reset(seed=0)
for i, hand in enumerate(envs.hands[:1 if SECONDS else 2]):
    hand.send("step", (0,)) if SECONDS else hand.send("call", ("time", (), {}))
if SECONDS:
    time.sleep(1)
END
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    ("seconds", "end", "code"),
    [
        (0, "os.kill(os.getpid(), 9)", -9),
        (0, "sys.exit(7)", 7),
        *(
            pytest.param(*case, marks=pytest.mark.faults)
            for case in [
                (0, "os._exit(7)", 7),
                (0, "os.kill(os.getpid(), 15)", -15),
                (1000, "os.kill(os.getpid(), 9)", -9),
                (1000, "sys.exit(7)", 7),
                ("never", "os.kill(os.getpid(), 9)", -9),
            ]
        ),
    ],
)
def test_no_process_outlives_its_parent(seconds, end, code):
    """Its standard output is open until the last of them has ended."""
    program = PARENT.replace("SECONDS", repr(seconds)).replace("END", end)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        timeout=25 if seconds == 1000 else 50,  # the kernel, which is the last resort, takes 29 s
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == code
    assert done.stderr == ""
    closed = 1 if seconds else 2  # one that is in a step that never ends, is not closed
    assert done.stdout.count("closed") == closed + 1  # and the one that gave the spaces


@pytest.mark.parametrize(
    "context",
    ["fork", *(pytest.param(c, marks=pytest.mark.faults) for c in ("spawn", "forkserver"))],
)
def test_processes_may_be_started_in_every_way(context):
    makers = [partial(Faulty, "step", DEATHS["its process ended with exit code 3"])] * 2
    check(in_processes(makers, context=context), "step", "its process ended with exit code 3")
