"""How many rows are generated at once: what a budget, or the free memory, has room for."""

from __future__ import annotations

import torch

from lightning_hybrid.containers import Decoder, rounded
from lightning_hybrid.errors import RolloutError

# Shares of the free memory that the KV cache may take; the rest is for activations and whoever else lives there.
CPU_SHARE, CUDA_SHARE = 0.3, 0.7
# Beyond it a CPU's caches are exceeded and a row costs more; a GPU's memory decides alone.
CPU_ROWS, CUDA_ROWS = 256, 1024


def slots_for(decoder: Decoder, capacity: int, rows: int, max_tokens_in_flight: int | None, held: int = 0) -> int:
    """Rows to generate at once, at most ``rows``.

    Args:
        decoder: whose cache it is.
        capacity: tokens that a row may have.
        rows: responses asked for.
        max_tokens_in_flight: tokens that the cache may hold; None for a share of the free memory.
        held: bytes of a cache that this one would replace.

    Raises:
        RolloutError: if there is no room for a single row.
    """
    if max_tokens_in_flight is not None:
        if max_tokens_in_flight < capacity:
            raise RolloutError(
                f"max_tokens_in_flight={max_tokens_in_flight} has no room for one row of {capacity} tokens "
                "(longest prompt and max_new_tokens): raise it, or lower max_new_tokens"
            )
        return min(rows, max_tokens_in_flight // capacity)
    needed, free = decoder.bytes_per_slot(capacity), free_bytes(decoder.device, held)
    if needed > free:
        raise RolloutError(
            f"the KV cache of one row of {capacity} tokens takes {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB "
            f"of {decoder.device} may be used: shorten prompts, or lower max_new_tokens"
        )
    most = CUDA_ROWS if decoder.device.type == "cuda" else CPU_ROWS
    return min(rows, most, int(free // needed))


def free_bytes(device: torch.device, held: int = 0) -> int:
    """Memory that a KV cache may take, ``held`` bytes of which are in use until it comes."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((free + reserved + held) * CUDA_SHARE)
    import psutil

    # Ranks on one machine share its memory; those on others are counted too, to be on the safe side.
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return int((psutil.virtual_memory().available / ranks + held) * CPU_SHARE)


def capacity_of(longest_prompt: int, max_new_tokens: int) -> int:
    """Tokens a row may have in the cache; the last one drawn never enters it."""
    return rounded(longest_prompt + max_new_tokens - 1)
