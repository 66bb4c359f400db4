"""Saving survives kills, full disks and other writers: there is the old file or the new one."""

import os
import random
import resource
import signal
import time

import pytest
import torch

from rl import checkpoint

# newer Pythons warn of forks beside threads, of which the children here use none
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.zip"


def state_of(n):
    """Return a state that is large enough to be killed in, and tells when it is mixed."""
    return {"n": n, "x": torch.full((20_000,), n, dtype=torch.float64)}


def assert_whole(state):
    assert (state["x"] == state["n"]).all()


def child(work):
    """Run a function in a process of its own; return its id."""
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(1)
    return pid


def save_for_ever(path, first):
    for n in range(first, first + 10**6):
        checkpoint.write(path, state_of(n))


def kill_while_saving(path, times):
    """Kill processes that save; return how often the state that was found was a new one."""
    checkpoint.write(path, state_of(0))
    chance, seen = random.Random(0), {0}
    for i in range(times):
        pid = child(lambda first=1000 * (i + 1): save_for_ever(path, first))
        time.sleep(chance.uniform(0.001, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        state = checkpoint.read(path)
        assert_whole(state)
        seen.add(state["n"])
    return len(seen) - 1


def test_a_process_killed_while_it_saves_leaves_a_whole_file(path):
    kill_while_saving(path, 10)


@pytest.mark.faults
def test_many_processes_killed_while_they_save_leave_a_whole_file(path, capsys):
    new = kill_while_saving(path, 500)
    left = [p for p in path.parent.iterdir() if p != path]
    for each in left:  # as if an hour had passed
        os.utime(each, (0, 0))
    checkpoint.write(path, state_of(1))
    assert [*path.parent.iterdir()] == [path]
    assert new > 100
    assert left
    with capsys.disabled():
        print(f"500 kills, 500 whole files, {new} of them new, {len(left)} left aside")  # a report


def test_a_full_disk_leaves_the_file_of_before(path):
    checkpoint.write(path, state_of(1))
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}, which is as it was before: File"):
            checkpoint.write(path, state_of(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]


def test_two_processes_may_save_to_one_file(path):
    def save():
        for n in range(30):
            checkpoint.write(path, state_of(n))
        os._exit(0)

    pids = [child(save) for _ in range(2)]
    while pids:
        if path.exists():
            assert_whole(checkpoint.read(path))
        ended, status = os.waitpid(pids[0], os.WNOHANG)
        if ended:
            assert status == 0
            del pids[0]
    assert [*path.parent.iterdir()] == [path]
    assert checkpoint.read(path)["n"] == 29


def test_a_file_that_is_replaced_or_deleted_while_it_is_read_is_the_one_that_was_opened(
    path, monkeypatch
):
    checkpoint.write(path, state_of(1))
    whole = checkpoint._verified

    def late(file):
        checkpoint.write(path, state_of(2))
        path.unlink()
        return whole(file)

    monkeypatch.setattr(checkpoint, "_verified", late)
    assert checkpoint.read(path)["n"] == 1
