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
from lightning_hybrid.rollout.vllm.engine import SleepingEngine
from lightning_hybrid.rollout.vllm.weights import WeightStream

TESTED = ("0.31",)
"""versions of vLLM, up to the second number, that the tests ran with"""
GIB = 1 << 30
# vLLM keeps groups of ranks and memory pools by process: there is one engine at a time.
_running: list[SleepingEngine] = []


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


def check_room(config: VLLMConfig, device: torch.device) -> None:
    """Refuse a share of the device that is not free, before other ranks depend on this one.

    Raises:
        ConfigError: naming the device and what is free of it.
    """
    if device.type != "cuda" or config.kv_cache_gib is not None:
        return
    free, total = torch.cuda.mem_get_info(device)
    if free < config.gpu_memory_utilization * total:
        raise ConfigError(
            f"rollout.vllm.gpu_memory_utilization = {config.gpu_memory_utilization:g} of {device} is "
            f"{config.gpu_memory_utilization * total / GIB:.1f} GiB, and {free / GIB:.1f} of {total / GIB:.1f} GiB are "
            "free: lower it, or free the device"
        )


def start_engine(
    weights: WeightStream, config: VLLMConfig, device: torch.device, dtype: torch.dtype, cache: int | None = None
) -> SleepingEngine:
    """An engine for a model's architecture, asleep, with weights that mean nothing; all ranks call it.

    Args:
        weights: of the model, of which only names and shapes are read.
        config: of the engine.
        device: of this rank.
        dtype: of its weights and arithmetic.
        cache: bytes of its KV cache; None: as configured.

    Raises:
        ConfigError: if vLLM cannot run the model, or not in the memory that it may have.
    """
    vllm = import_vllm()
    while _running:
        end_engine(_running[0])
    sleeps = config.enable_sleep and vllm.platforms.current_platform.is_sleep_mode_available()
    with tempfile.TemporaryDirectory() as folder, _no_trace(device):
        weights.config.save_pretrained(folder)
        arguments = {
            **common_arguments(config, folder, device, str(dtype).removeprefix("torch.")),
            "distributed_executor_backend": "external_launcher",
            "enable_sleep_mode": sleeps,
            **({} if cache is None else _cache_of(cache)),
            **config.options,
        }
        try:
            llm = vllm.LLM(**arguments)
            engine = SleepingEngine(llm, sleeps=sleeps, level=config.sleep_level, shapes=weights.shapes)
        except Exception as error:
            _clean_up(vllm)
            raise not_started(vllm, weights.config.architectures[0], error) from error
    _running.append(engine)
    return engine


def end_engine(engine: SleepingEngine) -> None:
    """Give back what an engine holds; one that has ended is left alone."""
    if engine not in _running:
        return
    _running.remove(engine)
    llm, engine.llm = engine.llm, None
    try:
        with _no_trace(None), _default_group_kept():
            if engine.sleeps:
                llm.wake_up()  # its allocator does not give back what is not there
            llm.llm_engine.engine_core.shutdown()
    finally:
        del llm
        _forget()


def _clean_up(vllm: Any) -> None:
    """Of a start that failed: vLLM's groups of ranks and what it had allocated."""
    with _default_group_kept():
        vllm.distributed.parallel_state.cleanup_dist_env_and_memory()
    _forget()


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def common_arguments(config: VLLMConfig, folder: str, device: torch.device, dtype: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` wherever an engine lives.

    Args:
        config: of the engine.
        folder: with the model's ``config.json``.
        device: that it runs on.
        dtype: of its weights and arithmetic.
    """
    return {
        "model": folder,
        "load_format": "dummy",
        "dtype": dtype,
        "tensor_parallel_size": config.tensor_parallel_size,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # nothing of the model's own: how to draw is the rollout's
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "seed": 0,
        "max_model_len": -1,  # the model's positions, or as many as the cache has room for
        **_memory(config, device),
    }


def not_started(vllm: Any, architecture: str, error: Exception) -> ConfigError:
    """What to say where ``vllm.LLM`` raised this error."""
    return ConfigError(
        f"vLLM {vllm.__version__} did not start for {architecture}: {error}; look at rollout.vllm, or use "
        "rollout.backend=native"
    )


def cache_bytes(engine: SleepingEngine) -> int | None:
    """Bytes of an engine's KV cache on this rank's device, as vLLM measured them; None where it measured nothing."""
    return engine.llm.collective_rpc(_measured_cache)[0]  # type: ignore[no-any-return]


def _measured_cache(worker: Any) -> int | None:
    measured = getattr(worker, "available_kv_cache_memory_bytes", None)
    return None if measured is None else int(measured)


def _memory(config: VLLMConfig, device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        size = int((config.kv_cache_gib or 1.0) * GIB)
        return {"kv_cache_memory_bytes": size, "enforce_eager": True, "block_size": 32}
    if config.kv_cache_gib is not None:
        return _cache_of(int(config.kv_cache_gib * GIB))
    return {"gpu_memory_utilization": config.gpu_memory_utilization}


def _cache_of(size: int) -> dict[str, Any]:
    # vLLM wants the share to be free before it looks at the size, of which alone it then takes the cache.
    return {"kv_cache_memory_bytes": size, "gpu_memory_utilization": 0.01}


@contextmanager
def _no_trace(device: torch.device | None) -> Iterator[None]:
    """Undo what an engine does to a process: random streams, threads, precision, variables of the environment."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    precision, environment = torch.get_float32_matmul_precision(), dict(os.environ)
    if device is not None:
        index = device.index if device.index is not None else own_rank()
        os.environ |= {"RANK": str(own_rank()), "LOCAL_RANK": str(index), "WORLD_SIZE": str(number_of_ranks())}
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        for name in [name for name in os.environ if name not in environment]:
            del os.environ[name]
        os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


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
