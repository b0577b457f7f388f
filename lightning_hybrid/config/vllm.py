"""Settings of vLLM engines that generate inside the ranks that train."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

# What the backend decides itself, for it could not keep its promises otherwise.
OURS = {
    "data_parallel_size": "there is an engine for each group of tensor_parallel_size ranks",
    "distributed_executor_backend": "engines run inside the ranks",
    "enable_sleep_mode": "set enable_sleep",
    "generation_config": "how to draw is the rollout's",
    "gpu_memory_utilization": "set gpu_memory_utilization beside options",
    "kv_cache_memory_bytes": "set kv_cache_gib",
    "load_format": "weights come from the engine that trains",
    "logprobs_mode": "log-probs are those of the distribution drawn from",
    "max_logprobs": "log-probs are those of the distribution drawn from",
    "model": "it is the policy",
    "pipeline_parallel_size": "there is an engine for each group of tensor_parallel_size ranks",
    "seed": "each response has a seed of its own",
    "skip_tokenizer_init": "token ids go in and come out",
    "tensor_parallel_size": "set tensor_parallel_size beside options",
    "tokenizer": "it is the policy's",
}


def _options_are_vllms_own(config: VLLMConfig) -> Problem | None:
    for name in sorted(config.options.keys() & OURS.keys()):
        return Problem(f"options.{name}", f"is not vLLM's to decide here: {OURS[name]}", repr(config.options[name]))
    return None


class VLLMConfig(Settings):
    """Engines of vLLM in the processes that train, asleep while they do."""

    rules: ClassVar[tuple[Rule, ...]] = (_options_are_vllms_own,)

    tensor_parallel_size: PositiveInt = 1
    """consecutive ranks that share one engine"""
    num_engines: PositiveInt | None = None
    """engines over all ranks, which times tensor_parallel_size is the number of ranks; null: as many as that is"""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """share of a device's memory that its engine may hold while awake, weights and KV cache together"""
    kv_cache_gib: PositiveFloat | None = None
    """GiB of the KV cache; null: what gpu_memory_utilization leaves, and 1 on a CPU"""
    enable_sleep: bool = True
    """give the device's memory back outside generation; without effect on a CPU, where vLLM cannot"""
    sleep_level: Literal[1, 2] = 2
    """2: weights are forgotten, and pushed again; 1: they wait in host memory, and are pushed when they have changed"""
    options: dict[str, Any] = Field(default_factory=dict)
    """further arguments of vllm.LLM, such as enforce_eager, enable_prefix_caching or max_num_seqs"""

    def problem_with(self, ranks: int) -> str | None:
        """Why engines do not come out even over this number of ranks, with the equation; None where they do."""
        engines, size = self.num_engines, self.tensor_parallel_size
        if ranks == (ranks // size if engines is None else engines) * size:
            return None
        given = f"{ranks / size:g}" if engines is None else str(engines)
        return (
            f"num_engines × tensor_parallel_size = number of ranks does not hold: {given} × {size} is not {ranks}; "
            "every rank is part of one engine: change one of them, or trainer.devices"
        )
