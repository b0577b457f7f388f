"""Where things run: what cannot work is refused before any process is started, the rest is put in its place."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import nn

from lightning_hybrid.errors import StrategyError


def refuse_unsuitable_device(device: torch.device, precision: str, processes: int) -> None:
    """Check what a run would start on.

    Args:
        device: this process's device.
        precision: a Lightning precision, such as ``"bf16-mixed"``.
        processes: processes on this machine.

    Raises:
        StrategyError: for an accelerator other than CPU and CUDA, fp16 on a CPU, or more processes than cores can run.
    """
    if device.type not in ("cpu", "cuda"):
        raise StrategyError(f"hybrid_deepspeed runs on CPU and CUDA; accelerator is {device.type!r}: set it to 'cpu'")
    if device.type == "cpu" and precision in ("16-true", "16-mixed"):
        raise StrategyError(f"precision={precision!r} (fp16) needs CUDA: use 'bf16-mixed' or '32-true' on CPU")
    cores = os.cpu_count() or 1
    if device.type == "cpu" and processes > 2 * cores:
        raise StrategyError(f"devices={processes} CPU processes for {cores} cores: use devices<={2 * cores}")


def place_outside(root: nn.Module, owned: Sequence[str], device: torch.device) -> None:
    """Move parameters and buffers of ``root`` to ``device``, but for those inside the submodules named ``owned``."""
    for module_name, module in root.named_modules():
        if not any(name in ("", module_name) or module_name.startswith(f"{name}.") for name in owned):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
