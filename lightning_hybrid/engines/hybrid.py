"""The engine that trains the policy and generates with the same weights."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.hybrid_engine import DeepSpeedHybridEngine
from torch import Tensor

from lightning_hybrid.containers import Decoder, InPlace, Shard, Weights, bind, reason_without_container
from lightning_hybrid.engines.build import causal_lm_in
from lightning_hybrid.engines.clock import PhaseClock
from lightning_hybrid.engines.gather import gathered, hooks_lifted
from lightning_hybrid.engines.tensor_parallel import GroupPrompts, gather_prompts, tensor_parallel_shard
from lightning_hybrid.engines.weights import Gathered, LayerByLayer, Sliced
from lightning_hybrid.errors import RolloutError
from lightning_hybrid.generation import (
    Rollout,
    SamplingParams,
    StopTexts,
    Workspace,
    check_prompts,
    end_ids,
    make_workspace,
    sample_with,
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
        self._workspace: Workspace | None = None
        self._shard = tensor_parallel_shard(hybrid.inference_tp_size) if hybrid.inference_tp_size > 1 else Shard()

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
            self._refuse_to_generate()
            stop = StopTexts(sampling.stop, tokenizer)
            together = gather_prompts(prompts, indices, seed, sampling, self._shard)
            self._check(together.prompts, sampling)
            rollout = self._sample(together, sampling, seed, stop, max_tokens_in_flight)
        return rollout.rows(together.begin * sampling.n, together.end * sampling.n)

    def _sample(
        self, together: GroupPrompts, sampling: SamplingParams, seed: int, stop: StopTexts, budget: int | None
    ) -> Rollout:
        begin = time.perf_counter()
        decoder = self._bound(max(map(len, together.prompts)) + sampling.max_new_tokens)
        bound = time.perf_counter()
        self._workspace = make_workspace(decoder, together.prompts, sampling, budget, self._workspace)
        rollout = sample_with(
            decoder,
            together.prompts,
            sampling,
            end_ids(self.causal_lm, sampling),
            seed,
            stop,
            workspace=self._workspace,
            indices=together.indices,
            any_rank=bool if decoder.weights.steady else any_rank,
        )
        self.timings.add_generation(together.end - together.begin, bound - begin, time.perf_counter() - bound)
        return rollout

    @contextmanager
    def _trainable_if_it_fails(self) -> Iterator[None]:
        """Leave training mode behind an exception, and no memory of generation."""
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
            reason = reason_without_container(self.causal_lm, 1)
            if reason is not None:
                warn_without_container(self.causal_lm, reason)
                return self.generate_with_model(input_ids, **kwargs)
            request = read_arguments(self.causal_lm, input_ids, kwargs)
            seed = int(torch.randint(2**62, ()))
            indices = [torch.distributed.get_rank() << 32 | row for row in range(len(request.prompts))]
            rollout = self.sample(request.prompts, request.sampling, seed, indices, tokenizer=request.tokenizer)
            return as_sequences(request, rollout)

    def generate_with_model(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Generate with the model's own ``generate``, whatever the family; arguments are Hugging Face's.

        Raises:
            RolloutError: if the engine is in training mode, or the model cannot generate.
        """
        model = self.causal_lm
        self._refuse_to_generate()
        begin = time.perf_counter()
        with torch.no_grad(), self._weights_for_model(kwargs):
            gathered_at = time.perf_counter()
            output: Tensor = model.generate(input_ids, **kwargs)
        self.timings.add_generation(len(output), gathered_at - begin, time.perf_counter() - gathered_at)
        return output

    def _refuse_to_generate(self) -> None:
        if not hasattr(self.causal_lm, "generate"):
            name = type(self.causal_lm).__name__
            raise RolloutError(f"{name} has no 'generate'; the hybrid engine needs a causal LM")
        if self.module.training:
            raise RolloutError("the engine is in training mode: call engine.eval() before generate()")

    def _check(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        """Refuse prompts that do not fit, of all ranks that generate together."""
        model_limit = max_positions(base_of(self.causal_lm).config)
        cache_limit = self._config.hybrid_engine.max_out_tokens
        if model_limit is not None and model_limit <= cache_limit:
            check_prompts(prompts, sampling, model_limit, "the model's", "positions")
        else:
            check_prompts(prompts, sampling, cache_limit, "hybrid_engine.max_out_tokens =", "tokens")

    def _bound(self, positions: int) -> Decoder:
        """The containers, reading the weights where they are, gathered, or cut."""
        model, config = self.causal_lm, self._config.hybrid_engine
        # For all lengths that may come: captured steps hold on to the rotary tables.
        most = min(config.max_out_tokens, max_positions(base_of(model).config) or config.max_out_tokens)
        positions = positions if reason_without_container(model, most) else max(most, positions)
        weights: Weights = InPlace()
        if self.Z3_enabled and self._shard.size > 1:
            weights = Sliced(model, self.device, config.tp_gather_partition_size)
        elif self.Z3_enabled:
            weights = Gathered(model, self.device) if self.gather_all_layers else LayerByLayer(model, self.device)
        decoder = bind(model, positions, weights, self._shard)
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


def any_rank(working: bool) -> bool:
    """Whether any rank still has work."""
    flag = torch.tensor(int(working), device=get_accelerator().current_device_name())
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
