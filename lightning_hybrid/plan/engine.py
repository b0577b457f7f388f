"""What an engine's DeepSpeed configuration says about memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

# DeepSpeed's defaults, in elements.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


@dataclass(frozen=True)
class Engine:
    """The engine of one model.

    Args:
        config: for DeepSpeed.
    """

    config: dict[str, Any]

    @cached_property
    def zero(self) -> dict[str, Any]:
        """Its ``zero_optimization``, DeepSpeed's defaults filled in."""
        zero: dict[str, Any] = self.config["zero_optimization"]
        plain = {name: zero[name.removeprefix("stage3_")] for name in DEFAULTS if name.removeprefix("stage3_") in zero}
        return DEFAULTS | plain | zero

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.zero["stage"])

    @property
    def offloads_optimizer(self) -> bool:
        """Whether optimizer states, master weights and gradients are in host memory."""
        return self.stage > 0 and self.zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloads_parameters(self) -> bool:
        """Whether ZeRO-3's weights are in host memory."""
        return self.stage == 3 and self.zero.get("offload_param", {}).get("device", "none") != "none"

    @property
    def bucket(self) -> int:
        """Elements of the buffer that gradients are reduced in."""
        return int(self.zero["reduce_bucket_size"])
