"""The algorithms that learn from their own rollouts: one class each, and one table.

An algorithm is a class of settings with two methods: ``credit``, from scores to advantages, and ``policy_loss``. A new
one is a file with such a class, a line below, and its YAML in ``conf/algorithm``: ``algorithm=NAME`` and ``PPOModule``
then take it.
"""

from __future__ import annotations

from lightning_hybrid.algorithms.cispo import CISPOConfig
from lightning_hybrid.algorithms.dapo import DAPOConfig
from lightning_hybrid.algorithms.dr_grpo import DrGRPOConfig
from lightning_hybrid.algorithms.group import GroupConfig
from lightning_hybrid.algorithms.grpo import GRPOConfig
from lightning_hybrid.algorithms.gspo import GSPOConfig
from lightning_hybrid.algorithms.judged import Credit, Judged
from lightning_hybrid.algorithms.online import OnlineConfig
from lightning_hybrid.algorithms.ppo import PPOConfig
from lightning_hybrid.algorithms.reinforce import ReinforcePlusPlusBaselineConfig, ReinforcePlusPlusConfig
from lightning_hybrid.algorithms.rloo import RLOOConfig

ALGORITHMS: dict[str, type[OnlineConfig]] = {
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
    "dr_grpo": DrGRPOConfig,
    "rloo": RLOOConfig,
    "reinforce_plus_plus": ReinforcePlusPlusConfig,
    "reinforce_plus_plus_baseline": ReinforcePlusPlusBaselineConfig,
    "gspo": GSPOConfig,
    "dapo": DAPOConfig,
    "cispo": CISPOConfig,
}

__all__ = [
    "ALGORITHMS",
    "CISPOConfig",
    "Credit",
    "DAPOConfig",
    "DrGRPOConfig",
    "GRPOConfig",
    "GSPOConfig",
    "GroupConfig",
    "Judged",
    "OnlineConfig",
    "PPOConfig",
    "RLOOConfig",
    "ReinforcePlusPlusBaselineConfig",
    "ReinforcePlusPlusConfig",
]
