"""The full loss in two forms: as stated in the paper and as computed by the released trainer."""

from __future__ import annotations

from typing import Any


def paper_loss(feature_block: int) -> dict[str, Any]:
    """Paper: squared distance of per-image means, features of the teacher, t uniform in [0, 600]."""
    return {
        "feature_block": feature_block,
        "mmd": {"penalty": "squared", "features": "teacher", "timesteps": {"high": 600.0}},
        "dmd": {"weight": 1.0, "guidance": 4.5, "timesteps": {"draw": "schedule", "high": 790.5}},
        "gan": {"weight": 0.005, "discriminator_weight": 0.01},
        "fake": {"updates": 5, "timesteps": {"draw": "schedule"}},
    }


def released_loss(feature_block: int) -> dict[str, Any]:
    """Released trainer: pseudo-Huber with c = 0.001, features of the fake model, timesteps 18..27 of its
    28-step schedule.
    """
    return {
        "feature_block": feature_block,
        "mmd": {
            "penalty": "huber",
            "c": 0.001,
            "features": "fake",
            "timesteps": {"draw": "schedule", "high": 603.0},
        },
        "dmd": {"weight": 1.0, "guidance": 4.5, "timesteps": {"draw": "schedule", "high": 790.5}},
        "gan": {"weight": 0.005, "discriminator_weight": 0.01},
        "fake": {"updates": 5, "timesteps": {"draw": "schedule"}},
    }
