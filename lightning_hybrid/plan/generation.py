"""What generation takes: the weights that containers read, the KV cache, and a pass of the decode loop."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_hybrid.containers import KVCache, rounded
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.generation.loop import PREFILL_TOKENS
from lightning_hybrid.generation.memory import CPU_ROWS, CPU_SHARE, CUDA_ROWS, CUDA_SHARE, capacity_of
from lightning_hybrid.plan.held import Held
from lightning_hybrid.plan.networks import Network
from lightning_hybrid.plan.setup import FP32, Setup


@dataclass(frozen=True)
class Cache:
    """The KV cache.

    Attributes:
        slots: rows generated at once.
        capacity: tokens of a row.
        bytes: of the whole cache on this rank.
    """

    slots: int
    capacity: int
    bytes: int

    @property
    def tokens(self) -> int:
        """Tokens in flight: what ``rollout.max_tokens_in_flight`` would have to be for the same cache."""
        return self.slots * self.capacity


def extra_weight_bytes(setup: Setup, actor: Network) -> int:
    """Beyond the weights being trained: ZeRO-3 gathers all, a layer at a time, or this rank's cuts."""
    if setup.stage < 3:
        return 0
    engine, sizes = setup.run.strategy.hybrid_engine, actor.unit_sizes
    if engine.inference_tp_size > 1:
        together = engine.tp_gather_partition_size
        gathering = max(sum(sizes[i : i + together]) for i in range(0, len(sizes), together))
        return int(cut_elements(actor, engine.inference_tp_size) + gathering) * actor.itemsize
    if engine.pin_parameters or actor.reason_without_container is not None:
        return actor.numel * actor.itemsize
    return int(max(sizes) * actor.itemsize)


def cut_elements(actor: Network, size: int) -> int:
    """A rank's cuts: matrices are divided, norms and biases are taken as whole."""
    whole = sum(int(p.numel()) for p in actor.module.parameters() if p.dim() < 2)
    return whole + -(-(actor.numel - whole) // size)


def cache_of(setup: Setup, free: int) -> Cache:
    """The cache of the longest prompts.

    Args:
        setup: of the run.
        free: bytes of the device that nobody holds when the cache comes.

    Raises:
        ConfigError: for key-value heads that ranks cannot share evenly.
    """
    config, engine = setup.networks["actor"].config.get_text_config(), setup.run.strategy.hybrid_engine
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    capacity = capacity_of(setup.prompt, setup.run.rollout.max_new_tokens)
    one = KVCache.bytes_per_slot(config.num_hidden_layers, _key_heads(setup), capacity, dim, setup.dtype)
    rows, budget = setup.rows * engine.inference_tp_size, setup.run.rollout.max_tokens_in_flight
    if budget is not None:
        slots = min(rows, budget // capacity)
    else:
        share, most = (CPU_SHARE, CPU_ROWS) if setup.on_cpu else (CUDA_SHARE, CUDA_ROWS)
        slots = min(rows, most, int(free * share) // one)
    # Without room for one row the run refuses; the plan shows what one row takes.
    slots = max(1, slots)
    return Cache(slots, capacity, slots * one)


def _key_heads(setup: Setup) -> int:
    """Key-value heads of one rank; those that do not divide are refused here, as containers refuse them."""
    config, size = setup.networks["actor"].config.get_text_config(), setup.run.strategy.hybrid_engine.inference_tp_size
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    if heads % size:
        raise ConfigError(
            f"strategy.hybrid_engine.inference_tp_size={size} does not divide the actor's {heads} key-value heads: "
            f"use a divisor of {heads}"
        )
    return heads // size


def reading_prompts(setup: Setup, cache: Cache) -> list[Held]:
    """Reading as many prompts as fit one pass: the wider of attention and MLP, and logits of their last tokens."""
    width = rounded(setup.prompt)
    rows = min(cache.slots, max(1, PREFILL_TOKENS // width))
    activations = rows * width * _per_token(setup) * setup.dtype.itemsize
    return [
        Held("actor", "activations", activations),
        # As the head gives them, repeated for each sample, and their exponentials.
        Held("actor", "logits", 3 * rows * _vocabulary(setup) * FP32),
    ]


def drawing_tokens(setup: Setup, cache: Cache) -> list[Held]:
    """One token for every row."""
    activations = cache.slots * _per_token(setup) * setup.dtype.itemsize
    return [
        Held("actor", "activations", activations),
        Held("actor", "logits", _logit_copies(setup) * cache.slots * _vocabulary(setup) * FP32),
    ]


def _logit_copies(setup: Setup) -> int:
    """Logits and their exponentials, and both again where sampling shapes them."""
    rollout = setup.run.rollout
    plain = (rollout.temperature, rollout.top_k, rollout.top_p, rollout.min_p, rollout.repetition_penalty)
    return 2 if plain == (1.0, 0, 1.0, 0.0, 1.0) and not rollout.min_new_tokens else 4


def tokens_seen(setup: Setup, cache: Cache) -> list[Held]:
    """A flag for each token of the vocabulary and each slot, with a repetition penalty."""
    if setup.run.rollout.repetition_penalty == 1.0:
        return []
    return [Held("actor", "buffers", cache.slots * _vocabulary(setup))]


def _per_token(setup: Setup) -> int:
    return elements_per_token(setup.networks["actor"], setup.run.strategy.hybrid_engine.inference_tp_size)


def elements_per_token(network: Network, size: int) -> int:
    """Elements that a token takes inside a layer, on one of the ``size`` ranks that share a model.

    Residual stream, its norm, and the MLP's inputs, activations and their product; or queries, keys and values, packed
    and padded, and what attention says.
    """
    config = network.config.get_text_config()
    width = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * width
    query = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or width // query
    key = getattr(config, "num_key_value_heads", None) or query
    attention = 2 * (query + 2 * key) * dim + 2 * query * dim
    return int(2 * width + max(4 * inner, attention) // size)


def _vocabulary(setup: Setup) -> int:
    return int(setup.networks["actor"].config.get_text_config().vocab_size)
