"""What vLLM engines take: their own copy of the weights and a KV cache, awake or asleep, and a push of the weights.

An engine may hold ``gpu_memory_utilization`` of a device while awake, and gives all that its weights and a pass leave
of it to the cache; with ``kv_cache_gib``, and on a CPU, the cache is given and the sum follows. Asleep, a colocated
engine holds nothing of the device (level 1: its weights in host memory); what CUDA graphs and communication keep is not
counted, nor can it be known beforehand. On a CPU vLLM cannot sleep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_hybrid.config import VLLMConfig
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.plan.experience import last_rollout, rollout
from lightning_hybrid.plan.generation import Cache, cut_elements, elements_per_token
from lightning_hybrid.plan.held import HOST, Held, Moment, moment
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.setup import FP32, Setup
from lightning_hybrid.plan.weights import GENERATE, at_rest

NAME = "vLLM"
GIB = 2**30
# vLLM's own: tokens of a page of its cache, and what a vocabulary is padded to.
PAGE, PAGE_ON_CPU, VOCABULARY = 16, 32, 64
# Its defaults for tokens and rows of a pass: on a CPU for each device of the engine, on a GPU, on one of 70 GiB.
ON_CPU, ON_GPU, ON_LARGE_GPU = (4096, 256), (8192, 256), (16384, 1024)
LARGE = 70 * GIB
CPU_CACHE_GIB = 1.0
# Logits, what they are shaped into, probabilities, and the noise that they are drawn with.
LOGIT_COPIES = 4


@dataclass(frozen=True)
class VLLMEngine:
    """One engine, as each of its devices holds it.

    Attributes:
        config: of the engines.
        device: bytes of the device.
        weights: bytes of its weights.
        activations: bytes of its largest pass.
        logits: bytes of drawing from a pass.
        cache: bytes of its KV cache; 0 where weights and a pass leave nothing.
        row: bytes of the longest row in the cache.
        asked: rows that it is asked for at a time.
        at_once: rows that vLLM draws for at a time, at most.
        on_cpu: whether the device is the host itself.
    """

    config: VLLMConfig
    device: int
    weights: int
    activations: int
    logits: int
    cache: int
    row: int
    asked: int
    at_once: int
    on_cpu: bool

    @property
    def rows(self) -> int:
        """Of the longest kind, that the cache holds at once."""
        return self.cache // self.row

    @property
    def without_cache(self) -> int:
        """Bytes of weights and a pass."""
        return self.weights + self.activations + self.logits

    @property
    def awake(self) -> int:
        """Bytes that it holds while it generates."""
        return self.without_cache + self.cache

    @property
    def by_share(self) -> bool:
        """Whether the cache is what ``gpu_memory_utilization`` leaves."""
        return self.config.kv_cache_gib is None and not self.on_cpu

    @property
    def sleeps(self) -> bool:
        """Whether it gives the device back while the ranks train."""
        return self.config.colocate and self.config.enable_sleep and not self.on_cpu

    def held(self) -> list[Held]:
        """What it holds while it generates."""
        return [
            Held(NAME, "weights", self.weights),
            Held(NAME, "KV cache", self.cache),
            Held(NAME, "activations", self.activations),
            Held(NAME, "logits", self.logits),
        ]

    def held_outside(self) -> list[Held]:
        """What it holds while others score and train."""
        if not self.sleeps:
            return [Held(NAME, "weights", self.weights), Held(NAME, "KV cache", self.cache)]
        return [Held(NAME, "weights", self.weights, HOST)] if self.config.sleep_level == 1 else []


def engine_of(setup: Setup, device: int) -> VLLMEngine:
    """The engine of the actor.

    Args:
        setup: of the run.
        device: bytes of one device.

    Raises:
        ConfigError: for engines that do not come out even over the ranks, or heads over an engine's devices.
    """
    config, actor = setup.run.rollout.vllm, replace(setup.networks["actor"], adapter=None)
    problem = config.problem_with(setup.ranks)
    if problem is not None:
        raise ConfigError(f"rollout.vllm: {problem}")
    asked = setup.drawn * setup.ranks // _engines(setup)
    tokens, at_once = _of_a_pass(setup, device)
    rows, size = min(asked, at_once), config.tensor_parallel_size
    # Started with a share of the device, it measures the largest pass that may be; else what comes counts.
    measured = config.kv_cache_gib is None and not setup.on_cpu
    tokens = tokens if measured else min(tokens, max(rows, rows * setup.prompt))
    activations = tokens * elements_per_token(actor, size) * setup.dtype.itemsize
    logits = LOGIT_COPIES * (at_once if measured else rows) * _padded(actor) * FP32
    weights = _weights(actor, size)
    left = int(config.gpu_memory_utilization * device) - weights - activations - logits
    given = int((config.kv_cache_gib or CPU_CACHE_GIB) * GIB)
    cache = max(0, left) if measured else given
    return VLLMEngine(config, device, weights, activations, logits, cache, _row(setup), asked, at_once, setup.on_cpu)


def _engines(setup: Setup) -> int:
    config = setup.run.rollout.vllm
    return setup.ranks // config.tensor_parallel_size if config.colocate else config.processes


def _of_a_pass(setup: Setup, device: int) -> tuple[int, int]:
    """Tokens and rows of a pass at most: as told, else as vLLM has it for such a device."""
    config = setup.run.rollout.vllm
    size = config.tensor_parallel_size if setup.on_cpu else 1
    tokens, rows = ON_CPU if setup.on_cpu else ON_LARGE_GPU if device >= LARGE else ON_GPU
    told = config.options
    return int(told.get("max_num_batched_tokens", size * tokens)), int(told.get("max_num_seqs", size * rows))


def _weights(actor: Network, size: int) -> int:
    """Matrices are divided among the devices; the rows that a vocabulary is padded by are counted whole."""
    tables = 1 if actor.config.get_text_config().tie_word_embeddings else 2
    padding = tables * (_padded(actor) - _vocabulary(actor)) * int(actor.config.get_text_config().hidden_size)
    return (cut_elements(actor, size) + -(-padding // size)) * actor.itemsize


def _padded(actor: Network) -> int:
    return -(-_vocabulary(actor) // VOCABULARY) * VOCABULARY


def _vocabulary(actor: Network) -> int:
    return int(actor.config.get_text_config().vocab_size)


def _row(setup: Setup) -> int:
    """Bytes of the longest row in one device's cache: whole pages of keys and values of the heads that it has."""
    config, vllm = setup.networks["actor"].config.get_text_config(), setup.run.rollout.vllm
    size, query = vllm.tensor_parallel_size, int(config.num_attention_heads)
    heads = int(getattr(config, "num_key_value_heads", None) or query)
    if query % size or max(heads, size) % min(heads, size):
        raise ConfigError(
            f"rollout.vllm.tensor_parallel_size={size} does not come out even over the actor's {query} heads, "
            f"{heads} of keys and values: use a divisor of both"
        )
    dim = getattr(config, "head_dim", None) or config.hidden_size // query
    width = 1 if str(vllm.options.get("kv_cache_dtype", "")).startswith("fp8") else setup.dtype.itemsize
    page = int(vllm.options.get("block_size", PAGE_ON_CPU if setup.on_cpu else PAGE))
    token = 2 * config.num_hidden_layers * max(1, heads // size) * dim * width
    return -(-setup.tokens // page) * page * int(token)


def cache_of_engine(setup: Setup, engine: VLLMEngine) -> Cache:
    """Its cache, as the other backends' are described: rows of the longest kind that it generates at once."""
    slots = max(1, min(engine.rows, engine.asked, engine.at_once))
    return Cache(slots, setup.tokens, engine.cache)


def generating(setup: Setup, engine: VLLMEngine) -> tuple[Moment, ...]:
    """The moments of a rollout in a rank.

    The actor's weights stay awake for the push. Separate engines generate somewhere else.
    """
    rest, inside = at_rest(setup, GENERATE, {"actor"}), engine.config.colocate
    weights = [Held(NAME, "weights", engine.weights)] if inside else []
    # On a CPU the cache is there all the time.
    cache = [Held(NAME, "KV cache", engine.cache)] if inside and not engine.sleeps else []
    pushing = [Held("actor", "buffers", push_bytes(setup))]
    return (
        moment("pushing weights to vLLM", rest, last_rollout(setup), weights, cache, pushing),
        moment("vLLM generates", rest, rollout(setup), engine.held() if inside else []),
    )


def push_bytes(setup: Setup) -> int:
    """Bytes of a rank, beyond both copies of the weights, while these are pushed.

    A layer at a time is whole where ZeRO-3 holds shards, or merged with its adapter; to separate engines goes a bucket.
    """
    actor, base = setup.networks["actor"], replace(setup.networks["actor"], adapter=None)
    whole = (setup.stage == 3 and setup.ranks > 1) or actor.adapter is not None
    layer = max(base.unit_sizes) * base.itemsize if whole else 0
    # An adapter is added in fp32, one weight at a time.
    merging = max(base.sizes) * FP32 if actor.adapter is not None else 0
    config = setup.run.rollout.vllm
    bucket = 0 if config.colocate else min(config.bucket_mib * 2**20, base.numel * base.itemsize)
    return int(layer + merging + bucket)
