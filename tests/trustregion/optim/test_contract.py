"""The forty checks of the contract of torch.optim, for every optimizer of the package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch import distributions as td
from torch.optim import lr_scheduler, swa_utils

from contract import CHECKS, OURS, SCHEDULERS


@pytest.fixture(autouse=True)
def validation():
    """Torch's default, which torch.compile turns off for the rest of the process."""
    before = td.Distribution._validate_args
    td.Distribution.set_default_validate_args(True)
    yield
    td.Distribution.set_default_validate_args(before)


def test_there_are_forty_checks():
    assert list(CHECKS) == list(range(1, 41))


def test_every_scheduler_of_torch_is_there():
    # LRScheduler is the base class, _LRScheduler its older name
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler)
    }
    assert set(SCHEDULERS) == found - {"LRScheduler", "_LRScheduler"}


LONG = (39, 40)  # These checks take hundreds of steps.
KEPT = [
    pytest.param(
        number,
        name,
        id=f"{number}-{name}",
        marks=[pytest.mark.slow] if number in LONG else [],
    )
    for number in CHECKS
    for name in OURS
]


@pytest.mark.parametrize(("number", "name"), KEPT)
def test_the_contract_is_kept(number, name):
    CHECKS[number](OURS[name])  # NotApplicable would be a failure too: ours offer all of it


@pytest.mark.slow
def test_the_entries_of_torchs_own_database_hold():
    pytest.importorskip("expecttest", reason="torch's database of optimizers needs expecttest")
    program = Path(__file__).parents[2] / "torch_database.py"
    command = [sys.executable, "-W", "ignore", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 2
    for name, entry in found.items():
        assert entry["failures"] == [], name
        assert entry["inputs"] >= 5  # the defaults, rates as floats and tensors, maximize
