"""What is logged of an optimizer's step."""

from __future__ import annotations

from trustregion import NaturalTrustRegion


def step_log(optimizer: NaturalTrustRegion) -> dict[str, float | str]:
    """Return what to log of the last step, under stable-baselines3's keys and ``trust/*``."""
    info = optimizer.info
    assert info is not None  # after a step
    return {
        "train/policy_objective": info.new_loss,
        "train/kl_divergence_loss": info.kl,
        "train/is_line_search_success": float(info.accepted),
        "trust/delta": optimizer.param_groups[0]["delta"],
        "trust/status": info.status.value,
        "trust/rho": info.rho,
        "trust/predicted_reduction": info.predicted_reduction,
        "trust/actual_reduction": info.actual_reduction,
        "trust/cg_iterations": info.cg_iterations,
        "trust/cg_residual": info.cg_residual,
        "trust/backtracks": info.backtracks,
    }
