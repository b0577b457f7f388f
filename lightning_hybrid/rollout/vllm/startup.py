"""Building a vLLM engine inside a rank, and ending it, without a trace on the process that trains."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.engines.agreement import number_of_ranks, own_rank
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import base_of
from lightning_hybrid.rollout.vllm.engine import SleepingEngine

TESTED = ("0.31",)
"""versions of vLLM, up to the second number, that the tests ran with"""
GIB = 1 << 30


def import_vllm() -> Any:
    """The module.

    Raises:
        ConfigError: where it is not installed, cannot be imported, or is of a version that was never tested.
    """
    tested = " or ".join(f"{version}.x" for version in TESTED)
    # In this process and no other, like everything that trains; chosen when it is imported.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        vllm = import_module("vllm")
    except ImportError as error:
        raise ConfigError(
            f"rollout.backend=vllm needs vLLM {tested}, which cannot be imported ({error}): install it as its "
            "documentation says for your device, or use rollout.backend=native"
        ) from error
    if not vllm.__version__.startswith(TESTED):
        raise ConfigError(
            f"rollout.backend=vllm is tested with vLLM {tested}, and this is {vllm.__version__}: install one of those, "
            "or use rollout.backend=native"
        )
    return vllm


def start_engine(model: Any, config: VLLMConfig, device: torch.device, dtype: torch.dtype) -> SleepingEngine:
    """An engine for a model's architecture, asleep, with weights that mean nothing; all ranks call it.

    Args:
        model: a causal LM, or peft's around it.
        config: of the engine.
        device: of this rank.
        dtype: of its weights and arithmetic.

    Raises:
        ConfigError: if vLLM cannot run the model, or not in the memory that it may have.
    """
    vllm = import_vllm()
    base = base_of(model)
    sleeps = config.enable_sleep and vllm.platforms.current_platform.is_sleep_mode_available()
    with tempfile.TemporaryDirectory() as folder, _no_trace(device):
        base.config.save_pretrained(folder)
        arguments = {
            "model": folder,
            "load_format": "dummy",
            "dtype": str(dtype).removeprefix("torch."),
            "tensor_parallel_size": config.tensor_parallel_size,
            "distributed_executor_backend": "external_launcher",
            "enable_sleep_mode": sleeps,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",  # nothing of the model's own: how to draw is the rollout's
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "seed": 0,
            **_memory(config, device),
            **config.options,
        }
        try:
            llm = vllm.LLM(**arguments)
        except Exception as error:
            raise ConfigError(
                f"vLLM {vllm.__version__} did not start for {type(base).__name__}: {error}; look at rollout.vllm, or "
                "use rollout.backend=native"
            ) from error
    return SleepingEngine(llm, sleeps=sleeps, level=config.sleep_level)


def end_engine(engine: SleepingEngine) -> None:
    """Give back what an engine holds."""
    with _no_trace(None), _default_group_kept():
        engine.llm.llm_engine.engine_core.shutdown()
    engine.llm = None
    gc.collect()


def _memory(config: VLLMConfig, device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        size = int((config.kv_cache_gib or 1.0) * GIB)
        return {"kv_cache_memory_bytes": size, "enforce_eager": True, "block_size": 32}
    if config.kv_cache_gib is not None:
        return {"kv_cache_memory_bytes": int(config.kv_cache_gib * GIB)}
    return {"gpu_memory_utilization": config.gpu_memory_utilization}


@contextmanager
def _no_trace(device: torch.device | None) -> Iterator[None]:
    """Undo what building an engine does to a process: random streams, threads, variables of the environment."""
    threads, set_threads, environment = torch.get_num_threads(), torch.set_num_threads, dict(os.environ)
    if device is not None:
        index = device.index if device.index is not None else own_rank()
        os.environ |= {"RANK": str(own_rank()), "LOCAL_RANK": str(index), "WORLD_SIZE": str(number_of_ranks())}
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _default_group_kept() -> Iterator[None]:
    """An engine that ends would end the process group of training, too."""
    destroy = dist.destroy_process_group

    def others_only(group: Any = None) -> None:
        if group is not None and group is not dist.group.WORLD:
            destroy(group)

    dist.destroy_process_group = others_only
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
