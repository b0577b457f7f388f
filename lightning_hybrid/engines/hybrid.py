"""The engine that trains the policy and generates with the same weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from torch import Tensor

from lightning_hybrid.containers import (
    Decoder,
    InPlace,
    Shard,
    Weights,
    bind,
    reason_without_container,
    refuse_without_container,
)
from lightning_hybrid.engines.build import causal_lm_in
from lightning_hybrid.engines.clock import PhaseClock
from lightning_hybrid.engines.gather import gathered, hooks_lifted
from lightning_hybrid.engines.lockstep import AnotherRankFailedError, LockStep, least
from lightning_hybrid.engines.tensor_parallel import GroupPrompts, gather_prompts, tensor_parallel_shard
from lightning_hybrid.engines.weights import Gathered, LayerByLayer, Sliced
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import (
    Rollout,
    SamplingParams,
    StopTexts,
    Workspace,
    capacity_of,
    check_prompts,
    end_ids,
    sample_with,
    slots_for,
    warn_without_container,
)
from lightning_hybrid.models import base_of, max_positions


class HybridEngine(DeepSpeedHybridEngine):  # type: ignore[misc]
    """A :class:`~deepspeed.runtime.hybrid_engine.DeepSpeedHybridEngine` that works for every causal LM.

    The interface is DeepSpeed's: ``eval()`` enters inference, ``generate(...)`` generates, ``train()`` leaves it. So
    are the keys of the ``hybrid_engine`` section. What differs: generation reads the trained tensors through inference
    containers; no layer is replaced (the output head stays trainable, grouped-query weights are untouched), no class
    holds state (several engines live in one process), and no rank's random state is overwritten (ranks sample different
    responses).

    Attributes:
        timings: seconds by phase.
        extra_weight_bytes: memory that the last rollout's weights took beyond those being trained.
        asleep: why the weights cannot be read now; None while they can.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Skips DeepSpeedHybridEngine.__init__ on purpose: it overwrites every rank's random state with rank 0's,
        # injects kernels into the module, and compiles a workspace op.
        DeepSpeedEngine.__init__(self, *args, **kwargs)
        self.Z3_enabled = self.zero_optimization_stage() == 3
        hybrid = self._config.hybrid_engine
        self.gather_all_layers = hybrid.pin_parameters
        self.timings = PhaseClock()
        self.extra_weight_bytes = 0
        self.asleep: str | None = None
        self._workspace: Workspace | None = None
        self._shard = tensor_parallel_shard(hybrid.inference_tp_size) if hybrid.inference_tp_size > 1 else Shard()
        self._lockstep = LockStep(self.Z3_enabled or self._shard.size > 1)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face causal LM inside, whether the engine owns it directly or inside a wrapper."""
        return causal_lm_in(self.module)

    def eval(self) -> None:
        """Enter inference; closes the record of the training phase before it, see :attr:`timings`."""
        self.timings.end_iteration()
        DeepSpeedEngine.eval(self)

    def train(self, mode: bool = True) -> None:
        """Enter training (or, with ``mode=False``, plain evaluation)."""
        DeepSpeedEngine.train(self, mode)
        if mode and self._config.hybrid_engine.release_inference_cache:
            self._workspace = None
        if mode:
            self.timings.start_training()

    def step(self, lr_kwargs: dict[str, Any] | None = None) -> None:
        """Apply the accumulated gradients; see :meth:`deepspeed.DeepSpeedEngine.step`."""
        DeepSpeedEngine.step(self, lr_kwargs=lr_kwargs)
        self.timings.add_training()

    # ---- generation ------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seed: int,
        indices: Sequence[int] | None = None,
        *,
        tokenizer: Any = None,
        max_tokens_in_flight: int | None = None,
    ) -> Rollout:
        """Sample responses through inference containers over the weights being trained.

        A response depends on the weights, ``seed``, its prompt's index and its sample's number only. With ZeRO-3 or
        ``inference_tp_size`` above 1 all ranks call it, with as many prompts as each has.

        Args:
            prompts: token ids, at least one each.
            sampling: how to draw.
            seed: of the random streams; torch's own are left alone.
            indices: of the prompts, over all ranks; by default their positions here.
            tokenizer: needed where ``sampling.stop`` has texts.
            max_tokens_in_flight: tokens that the KV cache may hold; by default a share of the free memory.

        Raises:
            RolloutError: in training mode; for a model without a container; for a prompt that is empty or too long. The
                engine is then back in training mode, its memory given back.
        """
        with self._trainable_if_it_fails():
            stop = self._lockstep.all(lambda: self._checked(prompts, sampling, tokenizer))
            together = self._lockstep.all(lambda: gather_prompts(prompts, indices, seed, sampling, self._shard))
            rollout = self._sample(together, sampling, seed, stop, max_tokens_in_flight)
        return rollout.rows(together.begin * sampling.n, together.end * sampling.n)

    def _sample(
        self, together: GroupPrompts, sampling: SamplingParams, seed: int, stop: StopTexts, budget: int | None
    ) -> Rollout:
        begin = time.perf_counter()
        decoder = self._bound()
        bound = time.perf_counter()
        workspace = self._fitting_workspace(decoder, together.prompts, sampling, budget)
        eos_ids = end_ids(self.causal_lm, sampling)
        any_rank = bool if decoder.weights.steady else self._lockstep.any
        try:
            rollout = sample_with(
                decoder, workspace, together.prompts, sampling, eos_ids, seed, stop, together.indices, any_rank
            )
        except AnotherRankFailedError:
            raise
        except Exception:
            if not decoder.weights.steady:
                self._lockstep.failed()
            raise
        responses = (together.end - together.begin) * sampling.n
        self.timings.add_generation(responses, bound - begin, time.perf_counter() - bound)
        return rollout

    def _fitting_workspace(
        self, decoder: Decoder, prompts: Sequence[Sequence[int]], sampling: SamplingParams, budget: int | None
    ) -> Workspace:
        """The last rollout's workspace where it serves, else a new one; alike on ranks that share a model."""
        capacity = capacity_of(max(map(len, prompts)), sampling.max_new_tokens)
        held = 0 if self._workspace is None else self._workspace.cache.data.nbytes
        rows = len(prompts) * sampling.n
        slots = self._lockstep.all(lambda: slots_for(decoder, capacity, rows, budget, held))
        slots = least(slots, self._shard)
        if self._workspace is None or not self._workspace.fits(decoder, slots, capacity, budget):
            self._workspace = None  # before there is another
            self._workspace = self._lockstep.all(lambda: Workspace(decoder, slots, capacity))
        return self._workspace

    @contextmanager
    def _trainable_if_it_fails(self) -> Iterator[None]:
        """After an exception go back to training mode, and give generation's memory back."""
        try:
            yield
        except BaseException:
            self._workspace = None
            self.train()
            raise

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Generate with the weights being trained, called as Hugging Face's ``generate`` is.

        Sampling is seeded from torch's default generator; ranks draw differently also where theirs are seeded alike. A
        model without an inference container generates by itself, see :meth:`generate_with_model`, after one warning.

        Args:
            input_ids: ``[batch, time]`` long, left-padded prompts.
            **kwargs: what Hugging Face's ``generate`` takes: ``attention_mask``, ``generation_config``, its fields.

        Returns:
            ``[batch × num_return_sequences, time + new]`` long: prompts and responses.

        Raises:
            RolloutError: in training mode, or for arguments that cannot be honoured, naming them.
        """
        from lightning_hybrid.generation.hf_arguments import as_sequences, read_arguments

        with self._trainable_if_it_fails():
            self._refuse_to_generate()
            reason = self.reason_without_container()
            if reason is not None:
                warn_without_container(self.causal_lm, reason)
                return self.generate_with_model(input_ids, **kwargs)
            request = self._lockstep.all(lambda: read_arguments(self.causal_lm, input_ids, kwargs))
            # Ranks that share a model draw with one seed, whatever each one's generator says.
            seed = least(int(torch.randint(2**62, ())), self._shard)
            indices = [torch.distributed.get_rank() << 32 | row for row in range(len(request.prompts))]
            rollout = self.sample(request.prompts, request.sampling, seed, indices, tokenizer=request.tokenizer)
            return as_sequences(request, rollout)

    def generate_with_model(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Generate with the model's own ``generate``, whatever the family; arguments are Hugging Face's.

        Raises:
            RolloutError: if the engine is in training mode, or the model cannot generate.
        """
        begin = time.perf_counter()
        with self._trainable_if_it_fails():
            self._refuse_to_generate()
            with torch.no_grad(), self._weights_for_model(kwargs):
                gathered_at = time.perf_counter()
                output: Tensor = self.causal_lm.generate(input_ids, **kwargs)
        self.timings.add_generation(len(output), gathered_at - begin, time.perf_counter() - gathered_at)
        return output

    def reason_without_container(self) -> str | None:
        """Why no container can run the model over the positions it may be asked for; the same on all ranks."""
        return reason_without_container(self.causal_lm, self._positions)

    @property
    def _positions(self) -> int:
        """Tokens that a prompt and its response may have together."""
        asked = int(self._config.hybrid_engine.max_out_tokens)
        return min(asked, max_positions(base_of(self.causal_lm).config) or asked)

    def _checked(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, tokenizer: Any) -> StopTexts:
        """Refuse what this rank was given that cannot be done, before any rank depends on it."""
        self._refuse_to_generate()
        refuse_without_container(self.causal_lm, self._positions)
        self._check(prompts, sampling)
        return StopTexts(sampling.stop, tokenizer)

    def _refuse_to_generate(self) -> None:
        if not hasattr(self.causal_lm, "generate"):
            name = type(self.causal_lm).__name__
            raise RolloutError(f"{name} has no 'generate'; the hybrid engine needs a causal LM")
        if self.asleep is not None:
            raise RolloutError(self.asleep)
        if self.module.training:
            raise RolloutError("the engine is in training mode: call engine.eval() before generate()")

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Refuse prompts that do not fit."""
        base, limit = base_of(self.causal_lm), self._positions
        of_model = max_positions(base.config) == limit
        whose, what = ("the model's", "positions") if of_model else ("hybrid_engine.max_out_tokens =", "tokens")
        check_prompts(prompts, sampling, limit, whose, what, base.get_input_embeddings().num_embeddings)

    def _bound(self) -> Decoder:
        """The containers, reading the weights where they are, gathered, or cut.

        For all positions that may ever be asked for: captured steps hold on to the rotary tables.
        """
        model, config = self.causal_lm, self._config.hybrid_engine
        weights: Weights = InPlace()
        if self.Z3_enabled and self._shard.size > 1:
            weights = Sliced(model, self.device, config.tp_gather_partition_size)
        elif self.Z3_enabled:
            weights = Gathered(model, self.device) if self.gather_all_layers else LayerByLayer(model, self.device)
        decoder = bind(model, self._positions, weights, self._shard)
        if isinstance(weights, Sliced):
            weights.fill()
        self.extra_weight_bytes = getattr(weights, "bytes", 0)
        return decoder

    @contextmanager
    def _weights_for_model(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Make the model's own weights readable: as they are, gathered once, or layer by layer with ranks in step."""
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
