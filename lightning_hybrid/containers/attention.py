"""Attention of new tokens over the KV cache: many per row when a prompt is read, one per row when a token is drawn."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_hybrid.containers.cache import KVCache, rounded
from lightning_hybrid.containers.transfer import sent

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Scores:
    """How a layer turns products of queries and keys into scores.

    Attributes:
        scale: factor on the products.
        window: positions a query sees, itself included; None for all.
        softcap: scores are squeezed into ``±softcap`` by tanh; None for not.
        slopes: ALiBi, ``[heads]`` float32, times the key's position; None for none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: Tensor | None = None


class Prefill:
    """Attention of whole prompts: causal within each row, nothing before it.

    Tokens come packed, row after row, without padding; padded rows exist only inside the attention.

    Args:
        cache: takes the keys and values.
        scores: of each layer.
        slots: ``[rows]`` long, where each row's cache is.
        lengths: tokens of each row.
    """

    def __init__(self, cache: KVCache, scores: list[Scores], slots: Tensor, lengths: list[int]) -> None:
        self.cache, self.scores, self.slots = cache, scores, slots
        self.rows, self.width = len(lengths), rounded(max(lengths))
        device = slots.device
        length = sent(lengths, device)
        # Packed token → its row and its column. Told how many there are, the device need not be asked.
        self.row = torch.arange(self.rows, device=device).repeat_interleave(length, output_size=sum(lengths))
        first = length.cumsum(0) - length
        self.column = torch.arange(len(self.row), device=device) - first[self.row]
        self.last = length.cumsum(0) - 1

    @property
    def positions(self) -> Tensor:
        """Each packed token's position in its row, ``[tokens]`` long."""
        return self.column

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[tokens, heads, dim]`` each → ``[tokens, heads, dim]``."""
        slot = self.slots[self.row]
        self.cache.keys(layer)[slot, :, self.column] = key
        self.cache.values(layer)[slot, :, self.column] = value
        q, k, v = (self._padded(x) for x in (query, key, value))
        scores = self.scores[layer]
        bias = self._bias(scores)
        if scores.softcap is not None:
            out = self._soft_capped(q, k, v, scores.scale, scores.softcap, bias)
        elif bias is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scores.scale, enable_gqa=True)
        else:
            bias = bias.to(q.dtype).masked_fill(self._future, -torch.inf)[None]
            out = F.scaled_dot_product_attention(q, k, v, bias, scale=scores.scale, enable_gqa=True)
        return out.transpose(1, 2)[self.row, self.column]

    def _padded(self, x: Tensor) -> Tensor:
        """Packed ``[tokens, heads, dim]`` → ``[rows, heads, width, dim]``, zero where there is no token."""
        padded = x.new_zeros(self.rows, self.width, *x.shape[1:])
        padded[self.row, self.column] = x
        return padded.transpose(1, 2)

    def _bias(self, scores: Scores) -> Tensor | None:
        """What is added to the scores beyond causality, ``[heads or 1, width, width]``; None for nothing."""
        index = self._index
        bias = None
        if scores.slopes is not None:
            bias = scores.slopes[:, None, None] * index.float()
        if scores.window is not None and scores.window < self.width:
            outside = index[:, None] - index >= scores.window
            bias = (0.0 if bias is None else bias) + _minus_infinity(outside)[None]
        return bias

    @cached_property
    def _index(self) -> Tensor:
        return torch.arange(self.width, device=self.slots.device)

    @cached_property
    def _future(self) -> Tensor:
        """True where a key comes after the query, ``[width, width]``."""
        return self._index[:, None] < self._index

    def _soft_capped(self, q: Tensor, k: Tensor, v: Tensor, scale: float, cap: float, bias: Tensor | None) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        products = torch.tanh(q @ k.transpose(-1, -2) * scale / cap) * cap
        if bias is not None:
            products = products + bias.to(products.dtype)
        return products.masked_fill(self._future, -torch.inf).softmax(-1, torch.float32).to(v.dtype) @ v


def make_decode(cache: KVCache, scores: list[Scores], lengths: Tensor, known: list[int]) -> KernelDecode | Decode:
    """Attention of one new token per row, in the kernel where that runs."""
    if kernel_serves(cache.data.device, cache.data.dtype):
        return KernelDecode(cache, scores, lengths)
    return Decode(cache, scores, lengths, known)


@functools.cache
def kernel_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether decode attention is our kernel's: it needs Triton, and a GPU of the Ampere generation or later."""
    if device.type != "cuda" or dtype not in KERNEL_DTYPES or find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


class KernelDecode:
    """Attention of one new token per row, rows in slots ``0 … rows - 1``, that reads nothing but live positions.

    A CUDA graph may hold it: lengths are read on the device, at each replay anew.

    Args:
        cache: takes the keys and values; a row without a free position is left as it is.
        scores: of each layer.
        lengths: ``[rows]`` long, tokens in each row's cache so far; the new one goes behind them.
    """

    def __init__(self, cache: KVCache, scores: list[Scores], lengths: Tensor) -> None:
        from lightning_hybrid.containers import decode_kernel  # imports Triton

        self.kernel, self.cache, self.scores = decode_kernel, cache, scores
        self.before = lengths.int()
        self.after = self.before + 1

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[rows, heads, dim]`` each → ``[rows, heads, dim]``."""
        rows, scores = len(query), self.scores[layer]
        keys, values = self.cache.keys(layer)[:rows], self.cache.values(layer)[:rows]
        self.kernel.write_kv(key, value, keys, values, self.before)
        return self.kernel.decode_attention(
            query,
            keys,
            values,
            self.after,
            scores.scale,
            window=scores.window,
            softcap=scores.softcap,
            slopes=scores.slopes,
        )


class Decode:
    """Attention of one new token per row, rows in slots ``0 … rows - 1``, by PyTorch alone.

    Rows of very different lengths are attended in pieces, each as wide as its longest row: a masked column costs as
    much as a live one.

    Args:
        cache: takes the keys and values.
        scores: of each layer.
        lengths: ``[rows]`` long, tokens in each row's cache so far; the new one goes behind them.
        known: the same numbers on the host, or more, below the cache's capacity.
    """

    RAGGED, PIECE = 64, 32

    def __init__(self, cache: KVCache, scores: list[Scores], lengths: Tensor, known: list[int]) -> None:
        self.cache, self.scores, self.lengths = cache, scores, lengths
        self.index = torch.arange(len(known), device=lengths.device)
        size = self.PIECE if max(known) - min(known) > self.RAGGED else len(known)
        begins = range(0, len(known), size)
        self.pieces = [_Piece(begin, lengths[begin : begin + size], known[begin : begin + size]) for begin in begins]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[rows, heads, dim]`` each → ``[rows, heads, dim]``."""
        keys, values = self.cache.keys(layer), self.cache.values(layer)
        keys[self.index, :, self.lengths] = key
        values[self.index, :, self.lengths] = value
        outs = [piece.attend(query[piece.rows], keys, values, self.scores[layer]) for piece in self.pieces]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class _Piece:
    """Neighbouring rows that are attended together.

    Args:
        begin: the first row.
        lengths: ``[rows]`` long, tokens behind which the new one is.
        known: the same numbers on the host, or more.
    """

    # With as many queries per head as this, CPU attention takes the same path, and rounds the same, as in training.
    LEAST_QUERIES = 4

    def __init__(self, begin: int, lengths: Tensor, known: list[int]) -> None:
        self.rows = slice(begin, begin + len(known))
        self.lengths = lengths
        self.live = rounded(max(known) + 1)  # columns that any row reads
        self._biases: dict[tuple[int | None, bool], Tensor] = {}

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scores: Scores) -> Tensor:
        """``[rows, heads, dim]`` over the layer's cache ``[slots, kv_heads, capacity, dim]``."""
        rows, heads, dim = query.shape
        keys, values = keys[self.rows, :, : self.live], values[self.rows, :, : self.live]
        grouped = query.reshape(rows, keys.shape[1], -1, dim)
        queries = grouped.shape[2]
        if queries < self.LEAST_QUERIES:
            grouped = F.pad(grouped, (0, 0, 0, self.LEAST_QUERIES - queries))
        bias = self._bias(scores, grouped)
        if scores.softcap is None:
            out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=scores.scale)
        else:
            products = grouped @ keys.transpose(-1, -2) * scores.scale
            products = torch.tanh(products / scores.softcap) * scores.softcap + bias
            out = products.softmax(-1, torch.float32).to(values.dtype) @ values
        return out[:, :, :queries].reshape(rows, heads, dim)

    def _bias(self, scores: Scores, grouped: Tensor) -> Tensor:
        """What is added to the scores, ``[rows, kv_heads or 1, queries or 1, live]``; made once for layers alike."""
        kind = (scores.window, scores.slopes is not None)
        if kind not in self._biases:
            columns = torch.arange(self.live, device=self.lengths.device)
            outside = columns > self.lengths[:, None]
            if scores.window is not None:
                outside |= columns <= (self.lengths - scores.window)[:, None]
            bias = _minus_infinity(outside)[:, None, None]
            if scores.slopes is not None:
                slopes = scores.slopes.view(grouped.shape[1], -1, 1)
                bias = bias + F.pad(slopes * columns.float(), (0, 0, 0, grouped.shape[2] - slopes.shape[1]))
            self._biases[kind] = bias.to(grouped.dtype)
        return self._biases[kind]


def _minus_infinity(where: Tensor) -> Tensor:
    """-inf where True, 0 elsewhere, float32."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(where, -torch.inf)
