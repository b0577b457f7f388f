"""Optimizer steps that are skipped, on all ranks together, where a loss or gradients are not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.engines.gradients import discard_gradients, forget_losses, losses_were_finite
from lightning_hybrid.errors import NonFiniteError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


LOGGER = logging.getLogger("lightning_hybrid")


class StepGuard:
    """Step engines, skip steps that would put NaN or inf into weights, and stop a run that only skips.

    Steps that an fp16 engine skips to find its loss scale are not counted.

    Args:
        most_in_a_row: skipped steps of one engine in a row at which the run stops.

    Attributes:
        in_a_row: by engine, steps skipped since the last one that was taken.
        total: all steps skipped, of all engines, since the run began.
    """

    def __init__(self, most_in_a_row: int) -> None:
        self.most_in_a_row = most_in_a_row
        self.in_a_row: dict[str, int] = {}
        self.total = 0
        self._skipped: set[str] = set()
        self._at = 0
        self._losses_were_finite = True

    def step(self, name: str, engine: DeepSpeedEngine, at: int, **kwargs: Any) -> bool:
        """Step ``engine`` if the gradients of all ranks are finite, otherwise drop them; equal on all ranks.

        Args:
            name: of the engine, for messages.
            engine: which to step.
            at: ``trainer.global_step``, for messages.
            **kwargs: for ``engine.step``.

        Returns:
            Whether the step was taken.
        """
        own_losses_finite = losses_were_finite(engine)
        forget_losses(engine)
        if step_if_finite(engine, **kwargs):
            self.in_a_row.pop(name, None)
            return True
        if engine.fp16_enabled() and engine.dynamic_loss_scale():
            return False
        self._count(name, at, own_losses_finite())
        return False

    def _count(self, name: str, at: int, own_losses_finite: bool) -> None:
        self.total += 1
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
        self._skipped.add(name)
        self._at, self._losses_were_finite = at, own_losses_finite
        if self.in_a_row[name] == 1 and (not own_losses_finite or torch.distributed.get_rank() == 0):
            what = "gradients" if own_losses_finite else "this rank's loss and gradients"
            LOGGER.warning(
                f"step {at}: {what} of engine {name!r} are not finite; its optimizer step is skipped on every rank"
            )

    def stop_if_hopeless(self) -> None:
        """Raise on every rank once an engine skipped too many steps in a row; its weights are the last good ones.

        To be asked between two batches: a checkpoint that is written then stands after whole ones.

        Only engines that skipped a step since this was last asked are judged.

        Raises:
            NonFiniteError: says which engine, how often, where, what was not finite and what to do.
        """
        judged, self._skipped = self._skipped, set()
        for name in sorted(judged):
            count = self.in_a_row.get(name, 0)
            if count >= self.most_in_a_row:
                raise self._hopeless(name, count)

    def _hopeless(self, name: str, count: int) -> NonFiniteError:
        error = NonFiniteError(
            f"engine {name!r} skipped its last {count} optimizer steps (strategy.max_nonfinite_steps="
            f"{self.most_in_a_row}), up to step {self._at}: {_said(of_all_ranks(self._losses_were_finite))}. Its "
            "weights are those of its last good step. Lower the learning rate, clip gradients "
            "(gradient_clip_val, or algorithm.max_grad_norm), look for extreme rewards or data, "
            "or train in precision 32-true"
        )
        error.on_every_rank = True
        return error

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"in_a_row": dict(self.in_a_row), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting where a checkpoint was; an empty state begins at zero.

        So does an engine whose skipped steps have stopped a run: whoever resumes it has changed something.
        """
        counts = state.get("in_a_row", {})
        self.in_a_row = {name: count for name, count in counts.items() if count < self.most_in_a_row}
        self._skipped = set()
        self.total = int(state.get("total", 0))


def step_if_finite(engine: DeepSpeedEngine, **kwargs: Any) -> bool:
    """Step the engine if no rank's gradients hold NaN or inf, otherwise drop them; equal on all ranks.

    ZeRO 1 to 3 and fp16 take the norm of the gradients of all ranks in every step and skip where it is not finite, so
    nothing is read or sent for it here. Where DeepSpeed looks at nothing (stage 0 in other precisions, or a config that
    turns it off), this does.

    Returns:
        Whether the step was taken.
    """
    if _checks_itself(engine):
        engine.step(**kwargs)
        taken = bool(engine.was_step_applied())
        if not taken:
            discard_gradients(engine)
            _clear_offloaded(engine)
        return taken
    if _everywhere(gradients_are_finite(engine)):
        engine.step(**kwargs)
        return True
    discard_gradients(engine)
    engine.skipped_steps += 1
    return False


def _checks_itself(engine: DeepSpeedEngine) -> bool:
    optimizer: Any = engine.optimizer
    if engine.fp16_enabled() or engine.zero_optimization_stage() == 3:
        return True
    computes = getattr(optimizer, "compute_grad_norm", False)
    return computes and (optimizer.dtype != torch.bfloat16 or optimizer.check_grad_overflow)


def _clear_offloaded(engine: DeepSpeedEngine) -> None:
    """Zero the gradients in host memory: of a parameter without a gradient in the next step, it would use these."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat"):
        for shard in getattr(engine.optimizer, name, ()):
            if shard.grad is not None:
                shard.grad.zero_()


def gradients_are_finite(engine: DeepSpeedEngine) -> bool:
    """Whether this rank holds no NaN or inf among the gradients that wait for ``engine.step``; sends nothing.

    All are read once. Finite ones whose norm overflows float32 (beyond 1e19) count as not finite.
    """
    held = list(_waiting_gradients(engine))
    if not held:
        return True
    return bool(torch.stack([norm.float() for norm in torch._foreach_norm(held)]).isfinite().all())


def _waiting_gradients(engine: DeepSpeedEngine) -> Iterator[Tensor]:
    """Every tensor in which ZeRO 0 to 3 keeps gradients between backward and step."""
    for parameter in engine.module.parameters():
        for name in ("grad", "grad_accum"):
            gradient = getattr(parameter, name, None)
            if gradient is not None:
                yield gradient
    for name in ("averaged_gradients", "all_grad_tensors"):
        for group in (getattr(engine.optimizer, name, None) or {}).values():
            yield from (gradient for gradient in group or () if gradient is not None)


def _everywhere(finite: bool) -> bool:
    """Whether it is so on all ranks."""
    if torch.distributed.get_world_size() == 1:
        return finite
    from lightning_hybrid.engines.lockstep import reduced  # needs DeepSpeed

    return reduced(int(finite), torch.distributed.ReduceOp.MIN) == 1


def _said(losses_were_finite: list[bool]) -> str:
    ranks = [str(rank) for rank, finite in enumerate(losses_were_finite) if not finite]
    if ranks:
        return f"the loss was NaN or inf on rank{'s' if len(ranks) > 1 else ''} {', '.join(ranks)}"
    return "the gradients were NaN or inf while the loss was finite on every rank"
