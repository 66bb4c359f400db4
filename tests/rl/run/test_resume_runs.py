"""``python -m rl train --resume``: runs that are stopped go on without a seam."""

import csv
import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from rl import TRPO, CSVLog, SaveBest, SaveCheckpoint, checkpoint, load
from rl.__main__ import main
from rl.run import logs
from rl.run.callbacks import KeepCheckpoint
from rl.run.folder import load_newest, locked

TINY = ["--n-envs", "4", "--steps-per-update", "128", "--hidden", "8", "--no-progress"]
TIMES = {"time/time_elapsed", "time/fps"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("rl.run.cli.plot_learning_curve", lambda *_, **__: None)


def train(*arguments, env="CartPole-v1", steps=1280):
    return main(["train", env, "--total-timesteps", str(steps), "--eval-episodes", "2", *arguments])


def resume(out, *arguments):
    return main(
        ["train", "--resume", str(out), "--no-progress", "--eval-episodes", "2", *arguments]
    )


def rows(out):
    with (out / "progress.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def state(path):
    """Return what a checkpoint says, but for times."""
    saved = checkpoint.read(path)
    saved["run"]["call"].pop("elapsed")
    return repr(saved)


def signalled(monkeypatch, number, at, times=1):
    """Have the update number ``at`` of the training send a signal to its process."""
    update = TRPO.update

    def sending(self, path):
        if self.iterations == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return update(self, path)

    monkeypatch.setattr(TRPO, "update", sending)
    return partial(monkeypatch.setattr, TRPO, "update", update)


@pytest.fixture
def whole(tmp_path):
    assert train("--out", str(tmp_path / "whole"), *TINY) == 0
    return tmp_path / "whole"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stopped_run_that_is_resumed_is_the_run_that_was_not(
    whole, name, tmp_path, monkeypatch, capsys
):
    number, out = getattr(signal, name), tmp_path / "run"
    handler = signal.getsignal(number)
    undo = signalled(monkeypatch, number, at=4)
    assert train("--out", str(out), *TINY) == 128 + number
    said = capsys.readouterr().err
    assert f"{name}: this update is finished and saved; once more to stop at once" in said
    assert f"stopped: python -m rl train --resume {out} goes on" in said
    assert signal.getsignal(number) is handler
    assert len(rows(out)) == 5
    undo()
    assert resume(out) == 0
    assert "goes on after" in capsys.readouterr().out
    assert rows(out) == rows(whole)
    assert state(out / "checkpoint.zip") == state(whole / "checkpoint.zip")
    best = [checkpoint.read(folder / "best.zip") for folder in (out, whole)]
    assert repr(best[0]) == repr(best[1])


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_stops_at_once(name, code, tmp_path, monkeypatch):
    signalled(monkeypatch, getattr(signal, name), at=2, times=2)
    out = tmp_path / "run"
    if name == "SIGINT":
        assert train("--out", str(out), *TINY) == code
    else:
        with pytest.raises(SystemExit) as stopped:
            train("--out", str(out), *TINY)
        assert stopped.value.code == code
    assert load(out / "checkpoint.zip").iterations == 2


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_its_log_has_no_seam(
    whole, tmp_path, monkeypatch
):
    """The log is ahead of the checkpoint when the process dies."""
    out, save = tmp_path / "run", KeepCheckpoint.save

    def saving(self, agent):
        if agent.iterations == 4:
            save(self, agent)

    with monkeypatch.context() as patch:
        patch.setattr(KeepCheckpoint, "save", saving)
        assert train("--out", str(out), "--save-every", "1e-9", *TINY) == 0
    assert load(out / "checkpoint.zip").iterations == 4 < len(rows(out))
    assert resume(out) == 0
    assert rows(out) == rows(whole)
    assert state(out / "checkpoint.zip") == state(whole / "checkpoint.zip")


def test_a_damaged_newest_checkpoint_falls_back_and_says_so(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    undo = signalled(monkeypatch, signal.SIGINT, at=4)
    train("--out", str(out), "--save-every", "1e-9", *TINY)
    undo()
    path = out / "checkpoint.zip"
    path.write_bytes(path.read_bytes()[:-1000])
    assert load_newest(out, load)[1].name == "checkpoint-before.zip"
    assert resume(out) == 0
    captured = capsys.readouterr()
    assert f"note: {path} is" in captured.err
    assert "from " + str(out / "checkpoint-before.zip") in captured.out
    assert load(path).progress == 1


def test_a_run_without_a_good_checkpoint_is_refused(whole, capsys):
    for name in ("checkpoint.zip", "checkpoint-before.zip"):
        (whole / name).write_bytes(b"nothing")
    assert resume(whole, "--total-timesteps", "9999") == 1
    assert capsys.readouterr().err.count("is not a complete") == 2


def test_a_finished_run_can_be_made_longer_with_other_options_and_says_so(whole, capsys):
    assert resume(whole) == 1
    assert "has made its 1,280 steps: pass a larger --total-timesteps" in capsys.readouterr().err
    steps = load(whole / "checkpoint.zip").num_timesteps
    assert resume(whole, "--total-timesteps", "2000", "--delta", "0.002") == 0
    config = json.loads((whole / "config.json").read_text())
    assert (config["delta"], config["total_timesteps"]) == (0.002, 2000)
    assert config["resumed"] == [
        {"after": steps, "total_timesteps": 2000, "changed": {"delta": 0.002}}
    ]
    deltas = [float(row["trust/delta"]) for row in rows(whole)]
    assert set(deltas) == {0.01, 0.002}
    assert deltas == sorted(deltas, reverse=True)
    assert load(whole / "checkpoint.zip").config.delta == 0.002


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["Pendulum-v1"], "is a run of the environment CartPole-v1, not Pendulum-v1"),
        (["--algo", "ppo"], "is a run of the algorithm trpo, not ppo"),
        (["--out", "other"], "--out is for new runs"),
        (["--preset", "default"], "--preset is for new runs"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(whole, arguments, words, capsys):
    assert resume(whole, *arguments) == 1
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert resume(tmp_path) == 1
    assert "is not a run folder: it has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert resume(tmp_path) == 1
    assert "config.json is damaged" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("[]")
    assert resume(tmp_path) == 1
    assert "does not name an algorithm" in capsys.readouterr().err


def test_a_module_is_imported_only_if_the_user_names_it(whole, capsys):
    config = json.loads((whole / "config.json").read_text())
    config["env_id"] = "no_such_module:CartPole-v1"
    (whole / "config.json").write_text(json.dumps(config))
    assert resume(whole, "--total-timesteps", "9999") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "which runs its code: if you trust it, pass no_such_module:CartPole-v1" in said


def test_two_processes_do_not_train_in_one_folder(whole, capsys):
    hold = "import sys; from pathlib import Path; from rl.run.folder import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(whole)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert resume(whole, "--total-timesteps", "2000") == 1
        assert f"another process is training in {whole}" in capsys.readouterr().err
        process.kill()  # which lets go
    assert resume(whole, "--total-timesteps", "1400") == 0
    with locked(whole):
        pass


def test_runs_that_start_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert train(*TINY, steps=100) == 0
    assert len([*(tmp_path / "runs" / "CartPole-v1").iterdir()]) == 3


# -- disks


def full(monkeypatch, where, after=0):
    """Have a method fail as on a full disk, after some calls."""
    kind, name = where
    whole, calls = getattr(kind, name), []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise OSError(28, "No space left on device")
        return whole(*arguments, **options)

    monkeypatch.setattr(kind, name, failing)
    return lambda: monkeypatch.setattr(kind, name, whole)


def test_on_a_full_disk_the_training_goes_on_and_the_old_file_stays(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr("rl.run.cli.SaveBest", lambda _: lambda *_: None)
    full(monkeypatch, (checkpoint, "write"), after=2)
    assert train("--out", str(out), "--save-every", "1e-9", *TINY) == 1  # the last one is missing
    said = capsys.readouterr().err
    assert said.count("note: no checkpoint was written, the training goes on: [Errno 28]") == 1
    assert "error: [Errno 28] No space left on device" in said
    assert len(rows(out)) > 8
    assert load(out / "checkpoint.zip").iterations == 2


def test_a_log_that_cannot_be_written_is_written_later(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    log = CSVLog(path, strict=False)
    log(None, {"time/iterations": 1, "a": 1.0})
    undo = full(monkeypatch, (logs, "_append"))
    for i in (2, 3):
        with pytest.warns(UserWarning, match="the log is not written, the training goes on"):
            log(None, {"time/iterations": i, "a": 1.0})
    undo()
    log(None, {"time/iterations": 4, "a": 1.0, "b": 2.0})
    assert logs.read_csv(path)["time/iterations"] == [1.0, 2.0, 3.0, 4.0]
    full(monkeypatch, (logs, "_append"))
    with pytest.raises(OSError, match="No space left"):
        CSVLog(path)(None, {"time/iterations": 5, "a": 1.0, "b": 1.0})


def test_half_a_row_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "log.csv"
    log = CSVLog(path)
    log(None, {"a": 1.0})
    before = path.read_bytes()

    class Half(csv.DictWriter):
        def writerows(self, rows):
            super().writerows(rows)
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv, "DictWriter", Half)
    for row in ({"a": 2.0}, {"a": 2.0, "b": 3.0}):  # appended, and with another header
        with pytest.raises(OSError, match="No space left"):
            log(None, row)
        assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


# -- what is kept


def test_of_checkpoints_by_step_the_last_are_kept(tmp_path):
    keep = SaveCheckpoint(tmp_path / "kept", keep=2)
    other = tmp_path / "kept" / "7.zip"
    other.write_bytes(b"of somebody else")
    agent = TRPO("CartPole-v1", n_envs=4, steps_per_update=64, hidden=(8,))
    agent.learn(300, False, logger=keep)
    names = sorted(p.name for p in (tmp_path / "kept").iterdir())
    assert len(names) == 3
    assert f"{agent.num_timesteps}.zip" in names
    assert "7.zip" in names
    again = SaveCheckpoint(tmp_path / "kept", keep=2)
    again.load_state_dict(keep.state_dict())
    agent.learn(64, False, logger=again)
    assert len([*(tmp_path / "kept").iterdir()]) == 3
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        SaveCheckpoint(tmp_path, keep=0)


def test_the_best_agent_by_any_entry_of_the_log_is_kept(tmp_path):
    best = SaveBest(tmp_path / "best.zip", "score")
    agent = TRPO("CartPole-v1", n_envs=4, steps_per_update=64, hidden=(8,))
    for iterations, log in enumerate([{}, {"score": 1.0}, {"score": float("nan")}, {"score": 0.5}]):
        agent.iterations = iterations
        best(agent, log)
    assert load(tmp_path / "best.zip").iterations == 1
    assert SaveBest(tmp_path / "best.zip", "score").best == 1.0
    with pytest.raises(ValueError, match="does not say what its agent reached"):
        SaveBest(tmp_path / "best.zip", "another")


def test_a_file_is_replaced_by_the_next_and_kept_beside_it(tmp_path):
    keep = KeepCheckpoint(tmp_path / "new.zip", tmp_path / "old.zip", 1e9)
    agent = TRPO("CartPole-v1", n_envs=4, steps_per_update=64, hidden=(8,))
    for steps in (0, 1, 2, 2):  # nothing was learnt before the last one
        agent.num_timesteps = steps
        keep.save(agent)
    assert load(tmp_path / "new.zip").num_timesteps == 2
    assert load(tmp_path / "old.zip").num_timesteps == 1
    assert len([*tmp_path.iterdir()]) == 2


# -- what goes wrong on the way


def test_a_change_that_no_checkpoint_has_seen_is_not_lost(tmp_path, monkeypatch):
    """The process dies between the change of the options and the first checkpoint with them."""
    out = tmp_path / "run"
    undo = signalled(monkeypatch, signal.SIGINT, at=4)
    train("--out", str(out), *TINY)
    undo()
    before = (out / "checkpoint.zip").read_bytes()
    assert resume(out, "--delta", "0.002", "--total-timesteps", "1400") == 0
    (out / "checkpoint.zip").write_bytes(before)
    assert resume(out) == 0
    assert load(out / "checkpoint.zip").config.delta == 0.002
    assert {row["trust/delta"] for row in rows(out)[5:]} == {"0.002"}


def test_a_damaged_file_does_not_replace_the_good_one(tmp_path, monkeypatch):
    out = tmp_path / "run"
    undo = signalled(monkeypatch, signal.SIGINT, at=4)
    train("--out", str(out), "--save-every", "1e-9", *TINY)
    undo()
    good = (out / "checkpoint-before.zip").read_bytes()
    (out / "checkpoint.zip").write_bytes(b"damaged")
    (out / "best.zip").write_bytes(b"damaged")
    full(monkeypatch, (checkpoint, "write"))
    assert resume(out) == 1
    assert (out / "checkpoint-before.zip").read_bytes() == good
    assert (out / "checkpoint-damaged.zip").read_bytes() == b"damaged"
    assert (out / "best-damaged.zip").read_bytes() == b"damaged"


def test_arguments_of_the_environment_can_be_changed_and_are_kept(tmp_path):
    out = tmp_path / "run"
    assert train("--out", str(out), "--env-kwargs", "g=9.0", *TINY, env="Pendulum-v1") == 0
    assert resume(out, "--env-kwargs", "g=5.0", "--total-timesteps", "1500") == 0
    config = json.loads((out / "config.json").read_text())
    assert config["env_kwargs"] == {"g": 5.0}
    assert config["resumed"][0]["changed"] == {"env_kwargs": {"g": 5.0}}


def test_a_closed_terminal_ends_no_update(tmp_path, monkeypatch):
    """A note that nobody can read any more is not an error."""

    def dead(message):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rl.run.cli._note", dead)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # of the tests' own streams
    signalled(monkeypatch, signal.SIGHUP, at=2)
    assert train("--out", str(tmp_path / "run"), *TINY) == 129
    assert len(rows(tmp_path / "run")) == 3
