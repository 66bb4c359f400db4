"""The optimizers with the options of their records given flat, as the parameter groups hold them.

Tests draw and combine options freely; users write ``search=Search(...)``.
"""

from dataclasses import fields

from trustregion import NaturalTrustRegion, NewtonTrustRegion
from trustregion.optim import Adapt, Region, Search


def _records(options, **kinds):
    """Move the options of each record into it."""
    options = dict(options)
    for name, kind in kinds.items():
        known = {field.name for field in fields(kind)} & options.keys()
        if known:
            options[name] = kind(**{key: options.pop(key) for key in known})
    return options


def natural(params, *args, **options):
    return NaturalTrustRegion(params, *args, **_records(options, search=Search, adapt=Adapt))


def newton(params, *args, **options):
    return NewtonTrustRegion(params, *args, **_records(options, region=Region))
