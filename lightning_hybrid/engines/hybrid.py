"""The engine that trains the policy and generates with the same weights."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from torch import Tensor

from lightning_hybrid.engines.gather import gathered, hooks_lifted
from lightning_hybrid.errors import RolloutError


class HybridEngine(DeepSpeedHybridEngine):  # type: ignore[misc]
    """A :class:`~deepspeed.runtime.hybrid_engine.DeepSpeedHybridEngine` that works for every causal LM.

    The interface is DeepSpeed's: ``eval()`` enters inference, ``generate(...)`` generates, ``train()`` leaves it. What
    differs: no layer is replaced (the output head stays trainable, grouped-query weights are untouched), no class holds
    state (several engines live in one process), and no rank's random state is overwritten (ranks sample different
    responses).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Skips DeepSpeedHybridEngine.__init__ on purpose: it overwrites every rank's random state with rank 0's,
        # injects kernels into the module, and compiles a workspace op.
        DeepSpeedEngine.__init__(self, *args, **kwargs)
        self.Z3_enabled = self.zero_optimization_stage() == 3
        self.gather_all_layers = self._config.hybrid_engine.pin_parameters
        self.timings = PhaseClock()

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face causal LM inside, whether the engine owns it directly or inside a wrapper."""
        inner = getattr(self.module, "model", None)
        return inner if hasattr(inner, "generate") else self.module

    def eval(self) -> None:
        """Enter inference; closes the record of the training phase before it, see :attr:`timings`."""
        self.timings.end_iteration()
        DeepSpeedEngine.eval(self)

    def train(self, mode: bool = True) -> None:
        """Enter training (or, with ``mode=False``, plain evaluation)."""
        DeepSpeedEngine.train(self, mode)
        if mode:
            self.timings.start_training()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Apply the accumulated gradients; see :meth:`deepspeed.DeepSpeedEngine.step`."""
        DeepSpeedEngine.step(self, lr_kwargs=lr_kwargs)
        self.timings.add_training()

    def generate(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Generate with the weights being trained.

        Args:
            input_ids: ``[batch, time]`` long, left-padded prompts.
            **kwargs: whatever Hugging Face's ``generate`` takes (``attention_mask``, ``max_new_tokens``, ...).

        Returns:
            ``[batch, time + new]`` long: prompts and responses, as Hugging Face's ``generate`` returns them.

        Raises:
            RolloutError: if the engine is in training mode, or the model cannot generate.
        """
        model = self.causal_lm
        if not hasattr(model, "generate"):
            raise RolloutError(f"{type(model).__name__} has no 'generate'; the hybrid engine needs a causal LM")
        if self.module.training:
            raise RolloutError("the engine is in training mode: call engine.eval() before generate()")
        begin = time.perf_counter()
        with torch.no_grad(), self._weights_for_generation(kwargs):
            gathered_at = time.perf_counter()
            output: Tensor = model.generate(input_ids, **kwargs)
        self.timings.add_generation(len(input_ids), gathered_at - begin, time.perf_counter() - gathered_at)
        return output

    @contextmanager
    def _weights_for_generation(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Make the weights readable: as they are, gathered once, or layer by layer with the ranks in step."""
        if not self.Z3_enabled:
            yield
        elif self.gather_all_layers:
            with hooks_lifted(self), gathered(self.module):
                yield
        else:
            kwargs["synced_gpus"] = True
            coordinator = self.optimizer.parameter_offload.get_param_coordinator()
            # The model inside is called, not the engine's module, so each forward must announce itself.
            start = self.causal_lm.register_forward_pre_hook(lambda *_: coordinator.reset_step())
            try:
                yield
            finally:
                start.remove()
                self.optimizer.parameter_offload.partition_all_parameters()


class PhaseClock:
    """Seconds spent generating, gathering and training between one ``eval()`` and the next.

    The figures are those DeepSpeed's hybrid engine prints, kept as numbers: :meth:`metrics` returns the last finished
    iteration's.
    """

    def __init__(self) -> None:
        self._begin: float | None = None
        self._training_since: float | None = None
        self._gather = self._generate = self._training = 0.0
        self._samples = 0
        self._last: dict[str, float] = {}

    def add_generation(self, samples: int, gather: float, generate: float) -> None:
        """Record one call of ``generate``: local samples, seconds of gathering and of generating."""
        self._samples += samples
        self._gather += gather
        self._generate += generate

    def start_training(self) -> None:
        """Training begins now."""
        self._training_since = time.perf_counter()

    def add_training(self) -> None:
        """Count the time since training began, or since the last call, as training."""
        if self._training_since is not None:
            now = time.perf_counter()
            self._training += now - self._training_since
            self._training_since = now

    def end_iteration(self) -> None:
        """Close the iteration that the previous call opened, and open the next."""
        now = time.perf_counter()
        if self._begin is not None and self._generate > 0:
            total = now - self._begin
            self._last = {
                "end_to_end_seconds": total,
                "gather_seconds": self._gather,
                "generate_seconds": self._generate,
                "training_seconds": self._training,
                "other_seconds": total - self._gather - self._generate - self._training,
                "samples_per_second": self._samples / total,
            }
        self._begin, self._training_since, self._samples = now, None, 0
        self._gather = self._generate = self._training = 0.0

    def metrics(self) -> dict[str, float]:
        """Seconds of the last finished iteration by phase, and this rank's samples per second; empty at first."""
        return dict(self._last)
