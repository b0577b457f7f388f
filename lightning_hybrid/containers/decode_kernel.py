"""Decode attention in Triton over one layer's KV cache: it reads the live positions and nothing else.

Import it only where Triton is installed. CUDA graphs may capture what is here: grids and scratch memory depend on
shapes alone, and the lengths are read on the device at each replay. The first call with new shapes, dtypes or options
compiles a kernel, so make it before the capture. All tensors must be on the current CUDA device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_DOT = 16  # the smallest side of a matrix product on tensor cores
MIN_SPLIT = 256  # positions of a row that one program reads: fewer would not repay its start
MAX_SPLITS = 32  # programs per row and KV head: in a large batch, each that finds nothing to read still has to start
# Keys, and as many values, that one step reads, by the bytes of an element: three steps fit into shared memory. Float32
# is multiplied outside the tensor cores, where larger blocks spill registers.
BLOCK_ELEMENTS = {2: 8192, 4: 2048}


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of each row's newest token to the row's live cache positions; row b of the batch lives in slot b.

    A row's result depends, to the last bit, on that row alone: not on the batch size, not on other rows. Scores,
    softmax and sums are in float32; softmax weights are rounded to the dtype of the values that they weight.

    Args:
        query: Float[B, heads, head_dim], of any strides, in the dtype of the cache.
        keys: Float[slots, kv_heads, capacity, head_dim], contiguous, slots >= B; the newest token's key is in it.
        values: Like ``keys``.
        lengths: Int32[slots]: row b attends to positions 0 to ``lengths[b] - 1``. A row of length 0 comes out as zeros;
            a length above ``capacity`` counts as ``capacity``.
        scale: Factor on the products of query and key.
        window: Attend to the last ``window`` live positions only; None attends to all.
        softcap: Squash each score to ``softcap * tanh(score / softcap)``; None leaves it.
        slopes: Float32[heads], contiguous: add ``slopes[head] * position`` to each score (ALiBi); None adds nothing.
        out: Float[B, heads, head_dim], contiguous, in the dtype of ``query``, to write to; None allocates it.

    Returns:
        Float[B, heads, head_dim] in the dtype of ``query``: ``out`` where given.

    Raises:
        ValueError: Tensors do not fit together, or ``window`` is not positive.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    _check_cache(keys, values, lengths, query=query, out=out)
    _check_attention(query, keys, out, slopes, window)
    batch, heads, head_dim = query.shape
    kv_heads, capacity = keys.shape[1:3]
    if batch == 0:
        return out
    span = capacity if window is None else min(window, capacity)
    split, splits = _plan(span)
    partial, logsumexp = _scratch(out, splits)
    block_dim = _block(head_dim)
    _attend[(batch, kv_heads, splits)](
        query,
        keys,
        values,
        lengths,
        slopes,
        partial,
        logsumexp,
        *query.stride(),
        scale,
        span,
        capacity,
        GROUP=heads // kv_heads,
        HEAD_DIM=head_dim,
        SOFTCAP=softcap,
        SPLIT=split,
        BLOCK=max(MIN_DOT, min(128, BLOCK_ELEMENTS[keys.element_size()] // block_dim)),
        BLOCK_GROUP=_block(heads // kv_heads),
        BLOCK_DIM=block_dim,
        num_warps=4,
        num_stages=3,
    )
    if logsumexp is not None:
        _combine[(batch, heads)](
            partial,
            logsumexp,
            lengths,
            out,
            span,
            splits,
            HEAD_DIM=head_dim,
            SPLIT=split,
            BLOCK_SPLITS=triton.next_power_of_2(splits),
            BLOCK_DIM=block_dim,
            num_warps=4,
        )
    return out


def write_kv(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
    """Writes the newest token's key and value into the cache: row b's to position ``lengths[b]`` of slot b.

    The lengths are those before the token and are not changed. A slot without a free position is left as it is: a
    captured graph goes on writing for rows that have ended.

    Args:
        key: Float[B, kv_heads, head_dim], of any strides, in the dtype of the cache.
        value: Like ``key``; its strides may differ.
        keys: Float[slots, kv_heads, capacity, head_dim], contiguous, slots >= B; written.
        values: Like ``keys``; written.
        lengths: Int32[slots], not negative.

    Raises:
        ValueError: Tensors do not fit together.
    """
    _check_cache(keys, values, lengths, key=key, value=value)
    if key.shape[1] != keys.shape[1]:
        raise ValueError(f"key has {key.shape[1]} heads, allowed is the cache's {keys.shape[1]}")
    batch, kv_heads, head_dim = key.shape
    if batch == 0:
        return
    _write[(batch, kv_heads)](
        key,
        value,
        keys,
        values,
        lengths,
        *key.stride(),
        *value.stride(),
        keys.shape[2],
        HEAD_DIM=head_dim,
        BLOCK_DIM=triton.next_power_of_2(head_dim),
        num_warps=1,
    )


def _plan(span: int) -> tuple[int, int]:
    """Positions per split and the number of splits: from the span alone, so that a row never feels the batch."""
    split = max(MIN_SPLIT, triton.next_power_of_2(triton.cdiv(span, MAX_SPLITS)))
    return split, triton.cdiv(span, split)


def _scratch(out: Tensor, splits: int) -> tuple[Tensor, Tensor | None]:
    """Where splits leave what they found, float32[B, heads, splits(, head_dim)]; the only split writes to ``out``."""
    if splits == 1:
        return out, None
    batch, heads, head_dim = out.shape
    partial = torch.empty((batch, heads, splits, head_dim), dtype=torch.float32, device=out.device)
    return partial, torch.empty((batch, heads, splits), dtype=torch.float32, device=out.device)


def _block(size: int) -> int:
    return max(MIN_DOT, int(triton.next_power_of_2(size)))


def _check_cache(keys: Tensor, values: Tensor, lengths: Tensor, **rows: Tensor) -> None:
    """Checks the cache, and that every tensor of ``rows`` is [B, heads, head_dim] and fits it."""
    if keys.dim() != 4 or keys.shape != values.shape or keys.dtype != values.dtype:
        raise ValueError(
            f"keys are {list(keys.shape)} {keys.dtype} and values {list(values.shape)} {values.dtype}, allowed is "
            "[slots, kv_heads, capacity, head_dim], the same for both"
        )
    if keys.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"keys are {keys.dtype}, allowed are torch.float16, torch.bfloat16 and torch.float32")
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(f"keys have strides {keys.stride()} and values {values.stride()}: both must be contiguous")
    if lengths.shape != keys.shape[:1] or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ValueError(
            f"lengths are {list(lengths.shape)} {lengths.dtype}, allowed is [{keys.shape[0]}] torch.int32, contiguous"
        )
    shape = next(iter(rows.values())).shape
    for name, row in rows.items():
        if row.dim() != 3 or row.shape != shape or len(row) > len(keys) or row.shape[2] != keys.shape[3]:
            raise ValueError(
                f"{name} is {list(row.shape)}, allowed is [B, heads, head_dim] like {next(iter(rows))}, with B of at "
                f"most {len(keys)} slots and head_dim {keys.shape[3]}"
            )
        if row.dtype != keys.dtype:
            raise ValueError(f"{name} is {row.dtype}, allowed is the cache's {keys.dtype}: convert it")


def _check_attention(query: Tensor, keys: Tensor, out: Tensor, slopes: Tensor | None, window: int | None) -> None:
    heads, kv_heads = query.shape[1], keys.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if not out.is_contiguous():
        raise ValueError(f"out has strides {out.stride()}, allowed is a contiguous tensor")
    if slopes is not None and (slopes.shape != (heads,) or slopes.dtype != torch.float32 or slopes.stride() != (1,)):
        raise ValueError(
            f"slopes are {list(slopes.shape)} {slopes.dtype}, allowed is [{heads}] torch.float32, contiguous"
        )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, allowed is a positive number of positions, or None for all")


# Kernels. ``span`` is the most positions that a row may attend to: capacity, or the window. A row's splits are counted
# from its first live position inside the span, so that a window shortens the grid and needs no mask.


@triton.jit(do_not_specialize=["span", "capacity"])  # type: ignore[untyped-decorator]
def _attend(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    lengths: tl.tensor,
    slopes: tl.tensor,
    partial: tl.tensor,
    logsumexp: tl.tensor,
    query_row: tl.tensor,
    query_head: tl.tensor,
    query_dim: tl.tensor,
    scale: tl.tensor,
    span: tl.tensor,
    capacity: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One split of one row for the GROUP query heads of one KV head, read block by block with an online softmax."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.minimum(tl.load(lengths + row), capacity)
    first = tl.maximum(length - span, 0) + split * SPLIT
    last = tl.minimum(first + SPLIT, length)
    if logsumexp is not None and first >= last:  # an only split goes on, to write zeros for a row of length 0
        return

    member, dim = tl.arange(0, BLOCK_GROUP), tl.arange(0, BLOCK_DIM)
    head, in_group, in_dim = kv_head * GROUP + member, member < GROUP, dim < HEAD_DIM
    at = row.to(tl.int64) * query_row + head[:, None] * query_head + dim[None, :] * query_dim
    q = tl.load(query + at, mask=in_group[:, None] & in_dim[None, :], other=0.0)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=in_group, other=0.0)

    # A cache may have more elements than int32 can count.
    slot = (row.to(tl.int64) * tl.num_programs(1) + kv_head) * capacity * HEAD_DIM
    largest = tl.full([BLOCK_GROUP], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_GROUP], tl.float32)
    mixed = tl.zeros([BLOCK_GROUP, BLOCK_DIM], tl.float32)
    for begin in range(first, last, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        live = position < last
        entry = slot + position[:, None] * HEAD_DIM + dim[None, :]
        k = tl.load(keys + entry, mask=live[:, None] & in_dim[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP is not None:
            # tanh(x) = 2 sigmoid(2x) - 1
            score = SOFTCAP * (2.0 * tl.sigmoid(score * (2.0 / SOFTCAP)) - 1.0)
        if slopes is not None:
            # Rounded as the training forward rounds it.
            bias = (slope[:, None] * position[None, :]).to(keys.dtype.element_ty)
            score += bias.to(tl.float32)
        score = tl.where(live[None, :], score, float("-inf"))
        # Every block has a live position: the maximum is finite, and exp meets no inf - inf.
        new_largest = tl.maximum(largest, tl.max(score, 1))
        weight = tl.exp(score - new_largest[:, None])
        shrink = tl.exp(largest - new_largest)
        total = total * shrink + tl.sum(weight, 1)
        v = tl.load(values + entry, mask=live[:, None] & in_dim[None, :], other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        largest = new_largest

    part = (row.to(tl.int64) * tl.num_programs(1) * GROUP + head) * tl.num_programs(2) + split
    mixed /= tl.where(total == 0.0, 1.0, total)[:, None]
    at = part[:, None] * HEAD_DIM + dim[None, :]
    tl.store(partial + at, mixed.to(partial.dtype.element_ty), mask=in_group[:, None] & in_dim[None, :])
    if logsumexp is not None:
        tl.store(logsumexp + part, largest + tl.log(total), mask=in_group)


@triton.jit(do_not_specialize=["span", "splits"])  # type: ignore[untyped-decorator]
def _combine(
    partial: tl.tensor,
    logsumexp: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    span: tl.tensor,
    splits: tl.tensor,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """The live splits of one row and head, weighted by the exponentials of their log-sum-exps."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DIM)
    # As many as wrote something: the scratch memory of the others holds anything.
    live = split < tl.cdiv(tl.minimum(tl.load(lengths + row), span), SPLIT)
    in_dim = dim < HEAD_DIM
    index = row * tl.num_programs(1) + head
    lse = tl.load(logsumexp + index * splits + split, mask=live, other=float("-inf"))
    weight = tl.exp(lse - tl.maximum(tl.max(lse, 0), -1e30))  # a row of length 0 has no finite maximum
    total = tl.sum(weight, 0)
    at = (index * splits + split[:, None]) * HEAD_DIM + dim[None, :]
    found = tl.load(partial + at, mask=live[:, None] & in_dim[None, :], other=0.0)
    mixed = tl.sum(weight[:, None] * found, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + index * HEAD_DIM + dim, mixed.to(out.dtype.element_ty), mask=in_dim)


@triton.jit(do_not_specialize=["capacity"])  # type: ignore[untyped-decorator]
def _write(
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    lengths: tl.tensor,
    key_row: tl.tensor,
    key_head: tl.tensor,
    key_dim: tl.tensor,
    value_row: tl.tensor,
    value_head: tl.tensor,
    value_dim: tl.tensor,
    capacity: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """One row's key and value of one head."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    position = tl.load(lengths + row)
    fits = (dim < HEAD_DIM) & (position < capacity)
    at = ((row * tl.num_programs(1) + head) * capacity + position) * HEAD_DIM + dim
    k = tl.load(key + row * key_row + head * key_head + dim * key_dim, mask=fits)
    v = tl.load(value + row * value_row + head * value_head + dim * value_dim, mask=fits)
    tl.store(keys + at, k, mask=fits)
    tl.store(values + at, v, mask=fits)
