"""Two processes that take one step together: as one would on all samples, or not at all.

The processes are those of ``ranks``; what they do is in ``replica_tasks``.
"""

import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ranks import Ended, Raised, started
from replica_tasks import (
    EVEN,
    ODD,
    Case,
    Mishap,
    begin_unfit,
    begin_with_other_state,
    differ,
    in_group,
    interrupted_at_random,
    reductions,
    resumed,
    sharded,
    stay_away,
    suffer,
    train,
)

EXAMPLE = Path(__file__).parents[3] / "docs" / "examples" / "data_parallel.py"
GGN = {"curvature": "ggn"}
FREE = {"radius": math.inf, "damping": 1.0, "damping_factor": 1.5}

CASES = {
    # predictions, and how the samples are divided
    "classes": Case(),
    "one sample here, all others there": Case(parts=ODD),
    "a normal": Case("normal"),
    "a joint": Case("joint"),
    "weights": Case("weighted"),
    "two groups": Case(rates=(1.0, 0.3)),
    "a group that stays": Case(rates=(1.0, 0.0)),
    "a parameter that one process has no sample for": Case("experts"),
    # options
    "maximize": Case("classes", {"maximize": True}),
    "constraints that hold": Case("kept"),
    "a constraint that is violated": Case("violated"),
    "penalty": Case(options={"penalty": 10.0, "kl_target": 1e-3, "delta": math.inf}),
    "max_kl": Case(options={"max_kl": 0.02, "delta": 0.01}),
    "dampings and scales": Case(options={"damping": (1e-3, 1e-1), "scales": (0.5, 1.0)}),
    "adapted": Case(options={"damping_factor": 1.5, "max_delta": 0.1}),
    "warm start": Case(options={"warm_start": 0.5, "cg_max_iter": 3}),
    "curvature of fewer samples": Case(curvature=True),
    "jacobi": Case(options={"preconditioner": "jacobi, exact"}),
    "a fixed preconditioner": Case(options={"preconditioner": "fixed"}),
    # NewtonTrustRegion
    "hessian, gltr": Case(newton=True),
    "hessian, the loss alone": Case("loss_alone", newton=True, parts=EVEN),
    "hessian, steihaug": Case("normal", {"solver": "steihaug"}, newton=True),
    "hessian, two groups": Case(newton=True, rates=(1.0, 0.3)),
    "ggn, outputs": Case("squares", GGN, newton=True),
    "ggn, a distribution": Case("joint", {**GGN, "solver": "steihaug"}, newton=True),
    "ggn, damped": Case("squares", {**GGN, **FREE}, newton=True),
    "ggn, cg": Case("squares", {**GGN, **FREE, "solver": "cg", "warm_start": 0.9}, newton=True),
    "ggn, weights": Case("weighted", GGN, newton=True),
    "the Fisher metric": Case("classes", {"metric": "fisher", "radius": 0.3}, newton=True),
    "rule": Case("classes", {"rule": "classic", "radius": 10.0}, newton=True),
}
SEARCHED = Case(options={"scales": (0.25, 0.5, 0.75, 1.0)})  # four trials at least
NEWTON = Case("loss_alone", newton=True, parts=EVEN)
TOLD = "another process of the group raised an error in this step"
GONE = "a process of the group has ended or cannot be reached"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    with started(tmp_path_factory.mktemp("group") / "store") as ranks:
        yield ranks


@pytest.fixture
def own_pair(tmp_path):
    """For what breaks a group; its processes wait 1 s for each other."""
    with started(tmp_path / "store", timeout=1.0) as ranks:
        yield ranks


# -- as one process on all samples


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_as_one_does_on_all_samples_and_hold_the_same_bits(pair, name):
    case = CASES[name]
    first, second = pair.run(train, case)
    one = train(None, case)
    # the solves multiply the rounding of the sums, which the two add up in another order; those
    # with the Fisher metric are themselves exact to 1e-6 only
    tolerance = 1e-6 if "metric" in case.options else 1e-8
    assert first == second  # parameters, losses and accounts, bit for bit
    for ours, alone in zip(first, one, strict=True):
        assert ours["theta"] == pytest.approx(alone["theta"], rel=tolerance, abs=tolerance)
        assert ours["loss"] == pytest.approx(alone["loss"], rel=tolerance)
        a, b = ours["info"], alone["info"]
        for same in ("status", "cg_status", "cg_iterations", "evaluations", "backtracks"):
            assert a[same] == b[same]
        for near in ("new_loss", "kl", "scale", "predicted_reduction", "constraints"):
            assert a[near] == pytest.approx(b[near], rel=1e-6, abs=1e-12)  # differences of losses
        for option, value in ours["options"].items():
            assert value == pytest.approx(alone["options"][option], rel=1e-6)
    assert one[-1]["theta"] != one[0]["theta"]  # there was something to compare


@pytest.mark.parametrize("rule", ["jacobi", "nystrom", "recycled"])
def test_preconditioners_made_from_products_keep_the_processes_together(pair, rule):
    first, second = pair.run(train, Case(options={"preconditioner": rule}))
    assert first == second
    assert all(step["info"]["kl"] <= 0.01 for step in first)
    assert first[-1]["loss"] < first[0]["loss"]


@pytest.mark.parametrize("newton", [False, True])
def test_kfac_is_refused_in_words(pair, newton):
    for raised in pair.run(train, Case(options={"preconditioner": "kfac"}, newton=newton)):
        assert raised.kind == "TypeError"
        assert "use Jacobi(), Nystrom(rank) or Recycled()" in raised.words


def test_a_step_costs_a_reduction_for_each_product_and_trial_and_four_more(pair):
    for counts in pair.run(reductions, Case()):
        assert all(count == 4 + products + trials for count, products, trials in counts)
    for counts in pair.run(reductions, NEWTON):
        assert all(count == 3 + products + trials for count, products, trials in counts)


def test_all_processes_resume_bit_for_bit(pair):
    options = {"warm_start": 0.5, "max_delta": 0.1, "preconditioner": "jacobi"}
    (through, resumed_), other = pair.run(resumed, Case(options=options))
    assert through == resumed_
    assert other == (through, resumed_)


# -- which processes


@pytest.mark.parametrize("which", ["world", "both"])
def test_a_group_is_taken_as_given(pair, which):
    first, second = pair.run(in_group, Case(), which)
    assert first == second == pair.run(train, Case())[0]


def test_false_opts_out_of_the_default_group(pair):
    alone, nothing = pair.run(in_group, Case(), "none")  # the other process takes no step
    assert nothing is None
    assert alone == train(0, Case())


def test_a_group_of_one_steps_alone_and_who_is_not_in_it_is_refused(pair):
    alone, other = pair.run(in_group, Case(), "first")
    assert alone == train(0, Case())
    assert other.kind == "ValueError"
    assert "not a member" in other.words


def test_what_is_not_a_group_is_refused(pair):
    for raised in pair.run(in_group, Case(), "true"):
        assert raised.kind == "TypeError"
        assert "got True" in raised.words


@pytest.mark.parametrize("how", ["fully_shard", "FSDP", "FSDP, original parameters", "DTensor"])
def test_sharded_parameters_are_refused(pair, how):
    for raised in pair.run(sharded, how):
        assert raised.kind == "TypeError"
        assert "is sharded between processes" in raised.words


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("parameter", "the parameters differ between the processes"),
        ("delta", "the options differ between the processes"),
        ("lr", "the options differ between the processes"),
        ("constraints", "disagree on the number of constraints"),
    ],
)
def test_processes_that_differ_are_refused_before_they_wait_for_each_other(pair, what, words):
    case = Case("kept" if what == "constraints" else "classes", rates=(1.0, 0.3))
    for raised in pair.run(differ, case, what):
        assert raised.kind == "ValueError"
        assert words in raised.words


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("option", "lr must be"),
        ("frozen", "all of them are frozen"),
        ("NaN", "holds a NaN"),
        ("scaler", "does not work with a GradScaler"),
    ],
)
@pytest.mark.parametrize("case", [SEARCHED, NEWTON], ids=["natural", "newton"])
def test_a_process_that_cannot_begin_a_step_tells_the_other_at_once(pair, case, how, words):
    other, here = pair.run(begin_unfit, case, how)
    assert words in here["words"]
    assert TOLD in other["words"]
    assert other["seconds"] < 10  # The group waits for 20.
    assert not here["moved"]
    assert not other["moved"]
    assert_unharmed(pair)


@pytest.mark.parametrize(
    "options",
    [{"warm_start": 0.5}, {"preconditioner": "jacobi"}, {"preconditioner": "recycled"}],
    ids=lambda options: next(iter(options)),
)
def test_other_states_of_the_optimizers_are_refused_in_words(pair, options):
    for raised in pair.run(begin_with_other_state, Case(options=options)):
        assert raised.kind == "ValueError"
        assert "the states of the optimizers differ" in raised.words
    assert_unharmed(pair)


def test_a_process_whose_optimizer_is_new_takes_the_calls_of_the_others(pair):
    first, second = pair.run(begin_with_other_state, SEARCHED)
    assert not isinstance(first, Raised)
    assert first == second
    assert_unharmed(pair)


# -- mishaps in one process


def assert_unharmed(pair):
    first, second = pair.run(train, Case(steps=1))
    assert first == second
    assert not isinstance(first, Raised)


@pytest.mark.parametrize("how", ["raise", "interrupt"])
@pytest.mark.parametrize(
    ("case", "where", "call"),
    [
        *[(SEARCHED, "closure", call) for call in (1, 2, 3, 5)],
        (SEARCHED, "backward", 1),
        *[(SEARCHED, "product", call) for call in (1, 4)],
        *[(NEWTON, "closure", call) for call in (1, 2)],
        (NEWTON, "backward", 1),
    ],
)
def test_what_one_process_raises_ends_the_step_of_both_and_moves_nothing(
    pair, how, case, where, call
):
    other, here = pair.run(suffer, case, Mishap(how, where, call))
    assert here["kind"] == {"raise": "ValueError", "interrupt": "KeyboardInterrupt"}[how]
    assert here["calls"][where] == call
    assert other["kind"] == "RuntimeError"
    assert TOLD in other["words"]
    assert not here["moved"]
    assert not other["moved"]
    assert_unharmed(pair)  # who catches the errors can go on


@pytest.mark.parametrize(
    ("case", "where", "call", "status"),
    [
        (Case(), "closure", 1, "NONFINITE_LOSS"),
        (Case(), "closure", 2, "NOT_REPRODUCIBLE"),  # a NaN before the step, too, from then on
        (Case(), "backward", 1, "NONFINITE_GRADIENT"),
        (Case(), "product", 1, "NONFINITE_OPERATOR"),
        (NEWTON, "closure", 1, "NONFINITE_LOSS"),
        (NEWTON, "closure", 2, "NOT_REPRODUCIBLE"),
        (NEWTON, "backward", 1, "NONFINITE_GRADIENT"),
    ],
)
def test_a_nan_in_one_process_is_a_nan_of_all(pair, case, where, call, status):
    both = pair.run(suffer, case, Mishap("nan", where, call))
    for result in both:
        assert (result["kind"], result["status"], result["moved"]) == ("", status, False)
    assert both[0]["theta"] == both[1]["theta"]


@pytest.mark.parametrize(
    ("where", "call"), [("closure", 1), ("closure", 3), ("product", 2), ("backward", 1)]
)
def test_a_process_that_dies_ends_the_step_of_the_other_in_words(own_pair, where, call):
    left, dead = own_pair.run(suffer, SEARCHED, Mishap("exit", where, call))
    assert dead == Ended(7)
    assert left["kind"] == "RuntimeError"
    assert GONE in left["words"]
    assert "Restart the group" in left["words"]
    assert not left["moved"]


def test_a_process_that_does_not_come_is_waited_for_as_long_as_the_group_says(own_pair):
    left, away = own_pair.run(stay_away, SEARCHED)
    assert away is None
    assert left.kind == "RuntimeError"
    assert GONE in left.words


@pytest.mark.slow
def test_a_process_that_is_late_for_a_trial_finds_the_step_ended(own_pair):
    both = own_pair.run(suffer, SEARCHED, Mishap("late", "closure", 2))
    for result in both:
        assert result["kind"] == "RuntimeError"
        assert GONE in result["words"]
        assert not result["moved"]


@pytest.mark.faults
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [Case(), NEWTON], ids=["natural", "newton"])
def test_a_process_interrupted_at_random_moments_holds_the_parameters_of_the_other(pair, case):
    first, second = pair.run(interrupted_at_random, case, 300)
    assert [theta for _, theta in first] == [theta for _, theta in second]
    assert {how.split(":")[0] for how, _ in second} <= {"KeyboardInterrupt", ""}
    assert all(how == "" or TOLD in how for how, _ in first)
    assert any(how for how, _ in first)


# -- the example


@pytest.mark.slow
def test_torchrun_takes_the_steps_of_one_process(capsys):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    run = subprocess.run(
        [*command, "2", str(EXAMPLE), "--steps", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    runpy.run_path(str(EXAMPLE))["main"](steps=3)
    several, one = (
        re.findall(r"-> ([\d.]+)", out) for out in (run.stdout, capsys.readouterr().out)
    )
    assert len(several) == 3
    assert [*map(float, several)] == pytest.approx([*map(float, one)], rel=1e-4)  # float32


def test_a_step_leaves_no_reference_to_the_group():
    # what holds it keeps its threads beyond destroy_process_group: Python then aborts at exit
    script = """
import sys
import torch
import torch.distributed as dist
from torch.distributions import Categorical
from trustregion import NaturalTrustRegion

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
before = sys.getrefcount(dist.group.WORLD)
net = torch.nn.Linear(2, 3)

def closure():
    prediction = Categorical(logits=net(torch.ones(1, 2)))
    return prediction.entropy().mean(), prediction

NaturalTrustRegion(net.parameters()).step(closure)
print(sys.getrefcount(dist.group.WORLD) - before)
dist.destroy_process_group()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "0", ended.stderr  # gloo may report its peers before
