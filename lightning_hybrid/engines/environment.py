"""Make DeepSpeed importable and startable on the device the Trainer chose, without compiling anything."""

from __future__ import annotations

import logging
import os
import warnings

from lightning_hybrid.errors import StrategyError


def prepare_deepspeed(device_type: str) -> None:
    """Tell DeepSpeed which accelerator to use, and keep its JIT build off the path of a CPU run.

    On a CPU, ``init_distributed`` would compile a shared-memory all-reduce for minutes (and hang on a stale lock of the
    extensions cache). Declaring that op incompatible sends all-reduce through gloo, which needs no compiler. Set
    ``LIGHTNING_HYBRID_SHM=1`` to have the compiled op.

    Args:
        device_type: ``"cpu"`` or ``"cuda"``.

    Raises:
        StrategyError: if DeepSpeed has already settled on another accelerator in this process.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device_type:
        raise StrategyError(
            f"the Trainer runs on {device_type!r} but DeepSpeed was started for {chosen!r} in this process: "
            f"set the environment variable DS_ACCELERATOR={device_type} before Python starts"
        )
    _quieten()
    if device_type == "cpu" and os.environ.get("LIGHTNING_HYBRID_SHM") != "1":
        _use_gloo_all_reduce()


def _quieten() -> None:
    """Leave out what tells the user nothing: DeepSpeed's settings, and the age of the collectives it calls."""
    import deepspeed.utils

    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)


def _use_gloo_all_reduce() -> None:
    import deepspeed.ops
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def forget_process_groups() -> None:
    """Drop the groups that DeepSpeed remembers from a process group that has since been destroyed."""
    from deepspeed.utils import groups

    groups._release_process_group_references(group=None)
