"""Reading the reports of the self-test."""

GRADIENT, SECOND = "the gradient of the loss", "the Fisher matrix is the KL's"


def outcome(report, passed):
    return {check.name for check in report.checks if check.passed is passed}


def value(report, name):
    return next(check.value for check in report.checks if check.name == name)
