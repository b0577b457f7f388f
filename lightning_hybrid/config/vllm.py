"""Settings of vLLM engines, which generate inside the ranks that train or in processes of their own."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

# What the backend decides itself, for it could not keep its promises otherwise.
OURS = {
    "data_parallel_size": "set num_engines",
    "distributed_executor_backend": "it follows from colocate",
    "enable_sleep_mode": "set enable_sleep",
    "generation_config": "how to draw is the rollout's",
    "gpu_memory_utilization": "set gpu_memory_utilization beside options",
    "kv_cache_memory_bytes": "set kv_cache_gib",
    "load_format": "weights come from the engine that trains",
    "logprobs_mode": "log-probs are those of the distribution drawn from",
    "max_logprobs": "log-probs are those of the distribution drawn from",
    "model": "it is the policy",
    "pipeline_parallel_size": "an engine is spread over tensor_parallel_size devices",
    "seed": "each response has a seed of its own",
    "skip_tokenizer_init": "token ids go in and come out",
    "tensor_parallel_size": "set tensor_parallel_size beside options",
    "tokenizer": "it is the policy's",
}


def _options_are_vllms_own(config: VLLMConfig) -> Problem | None:
    for name in sorted(config.options.keys() & OURS.keys()):
        return Problem(f"options.{name}", f"is not vLLM's to decide here: {OURS[name]}", repr(config.options[name]))
    return None


def _devices_are_those_of_separate_engines(config: VLLMConfig) -> Problem | None:
    if config.devices is None:
        return None
    if config.colocate:
        return Problem("devices", "are the ranks' own with colocate=true: leave them out", repr(config.devices))
    engines, size = config.processes, config.tensor_parallel_size
    if len(config.devices) == len(set(config.devices)) == engines * size:
        return None
    needed = f"{engines} × {size} = {engines * size} different ones are needed (num_engines × tensor_parallel_size)"
    return Problem("devices", needed, repr(config.devices))


class VLLMConfig(Settings):
    """Engines of vLLM: in the processes that train, asleep while they do; or in processes of their own."""

    rules: ClassVar[tuple[Rule, ...]] = (_options_are_vllms_own, _devices_are_those_of_separate_engines)

    colocate: bool = True
    """engines inside the ranks that train; false: in processes of their own, on devices of their own"""
    tensor_parallel_size: PositiveInt = 1
    """devices that share one engine: of consecutive ranks, or of the engine's own process"""
    num_engines: PositiveInt | None = None
    """engines over all ranks. Colocated, times tensor_parallel_size they are the ranks; null: as many as that is. \
Otherwise the number of processes, of which and of ranks one divides the other; null: 1"""
    devices: list[NonNegativeInt] | None = None
    """CUDA indices of separate engines, tensor_parallel_size for each; null: the ones after the ranks'"""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """share of a device's memory that its engine may hold while awake, weights and KV cache together"""
    kv_cache_gib: PositiveFloat | None = None
    """GiB of the KV cache; null: what gpu_memory_utilization leaves, and 1 on a CPU"""
    enable_sleep: bool = True
    """give the device's memory back outside generation; without effect on a CPU, where vLLM cannot, and with \
colocate=false"""
    sleep_level: Literal[1, 2] = 2
    """2: weights are forgotten, and pushed again; 1: they wait in host memory, and are pushed when they have changed"""
    bucket_mib: PositiveInt = 256
    """MiB of weights that go to separate engines at a time"""
    timeout_seconds: PositiveFloat = 600.0
    """silence of a separate engine that has work, after which it is started anew, once, and then the run stopped"""
    options: dict[str, Any] = Field(default_factory=dict)
    """further arguments of vllm.LLM, such as enforce_eager, enable_prefix_caching or max_num_seqs"""

    @property
    def processes(self) -> int:
        """Processes that separate engines have; 0 where engines are inside the ranks."""
        return 0 if self.colocate else self.num_engines or 1

    def problem_with(self, ranks: int) -> str | None:
        """Why engines do not come out even over this number of ranks, with the numbers; None where they do."""
        return self._uneven_inside(ranks) if self.colocate else self._uneven_beside(ranks)

    def _uneven_inside(self, ranks: int) -> str | None:
        engines, size = self.num_engines, self.tensor_parallel_size
        if ranks == (ranks // size if engines is None else engines) * size:
            return None
        given = f"{ranks / size:g}" if engines is None else str(engines)
        return (
            f"num_engines × tensor_parallel_size = number of ranks does not hold: {given} × {size} is not {ranks}; "
            "every rank is part of one engine: change one of them, or trainer.devices"
        )

    def _uneven_beside(self, ranks: int) -> str | None:
        engines = self.processes
        if ranks % engines == 0 or engines % ranks == 0:
            return None
        return (
            f"{engines} engines (num_engines) cannot be shared evenly by {ranks} ranks: one number must divide the "
            "other; change one of them, or trainer.devices"
        )
