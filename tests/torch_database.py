"""Run our optimizers through torch's own database of optimizers, and print the failures as JSON.

This is a separate program because importing the database turns off torch's global flags and loads
another profile of Hypothesis. It needs ``expecttest``.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from typing import Any

import torch
from torch import nn

from contract import OURS, Subject
from contract.construction import goes_right

MINE = {"NaturalTrustRegion", "NewtonTrustRegion"}


def info_of(database: Any, subject: Subject) -> Any:
    """Return the entry that an optimizer of ours would have in the database."""
    known = subject.make([nn.Parameter(torch.ones(1))]).defaults

    def inputs(device: str, dtype: Any = None) -> list[Any]:
        """Return the inputs of all of torch's optimizers that name options of ours alone."""
        every = (i for info in database.optim_db for i in info.optim_inputs_func(device=device))
        different = {repr(sorted(i.kwargs.items())): i for i in every}
        return [i for i in different.values() if i.kwargs.keys() <= known.keys()]

    return database.OptimizerInfo(
        subject.make,
        optim_inputs_func=inputs,
        optim_error_inputs_func=database.get_error_inputs_for_all_optims,
        supported_impls=(),
        supports_complex=False,
        step_requires_closure=True,
    )


def construction_failures(info: Any) -> list[str]:
    """Return the construction errors of torch that are not raised in its words."""
    failures = []
    for entry in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = entry.optimizer_error_input
        params = given.params or [nn.Parameter(torch.ones(1))]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                info.optim_cls(params, **given.kwargs)
        except entry.error_type as error:
            if re.search(entry.error_regex, str(error)):
                continue
        failures.append(given.desc)
    return failures


def main() -> None:
    """Print, for each optimizer, how many entries there are and which fail."""
    database = importlib.import_module("torch.testing._internal.common_optimizers")
    found = {}
    for name in sorted(MINE):
        subject = OURS[name]
        info = info_of(database, subject)
        inputs = info.optim_inputs_func(device="cpu")
        failures = construction_failures(info)
        for given in inputs:
            try:
                goes_right(subject, given.kwargs)
            except AssertionError as error:
                failures.append(f"{given.desc}: {error}")
        found[name] = {"inputs": len(inputs), "failures": failures}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
