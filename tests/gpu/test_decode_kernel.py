"""Decode attention in Triton against plain PyTorch: on a GPU, or on a CPU with TRITON_INTERPRET=1 (both: -m gpu).

The interpreter of Triton 3.6 needs a NumPy before 2.4.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest.importorskip("triton", reason="Triton is not installed")
if not (CUDA or INTERPRETED):
    pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1", allow_module_level=True)

from lightning_hybrid.containers import decode_kernel  # noqa: E402  (it imports Triton)
from lightning_hybrid.containers.decode_kernel import decode_attention, write_kv  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    # Triton's interpreter counts its loops with NumPy arrays.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]

# Two splits, the second ends inside a block; lengths before, at and after the edges of blocks and splits.
CAPACITY = 300
LENGTHS = [300, 0, 1, 33, 256, 257]
NAN = float("nan")

BFLOAT16 = pytest.param(
    torch.bfloat16, marks=pytest.mark.skipif(not CUDA, reason="Triton's interpreter multiplies bfloat16 as integers")
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def cache(
    lengths: list[int], kv_heads: int, head_dim: int, capacity: int = CAPACITY, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values that are NaN beyond each row's length: whoever reads there shows it."""
    both = normal(2, len(lengths), kv_heads, capacity, head_dim, seed=1, dtype=dtype)
    for slot, length in enumerate(lengths):
        both[:, slot, :, length:] = NAN
    return both[0].contiguous(), both[1].contiguous()


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """Row by row, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    group = query.shape[1] // keys.shape[1]
    for row, length in enumerate(lengths[: len(query)].tolist()):
        first = 0 if window is None else max(0, length - window)
        if first == length:
            continue
        k, v = (part[row, :, first:length].double().repeat_interleave(group, dim=0) for part in (keys, values))
        score = torch.einsum("hd,htd->ht", query[row].double(), k) * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score += slopes.double()[:, None] * torch.arange(first, length, device=score.device)
        out[row] = torch.einsum("ht,htd->hd", score.softmax(-1), v)
    return out


def assert_equals_reference(query: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, **options: object) -> None:
    scale = query.shape[-1] ** -0.5
    got = decode_attention(query, keys, values, lengths, scale, **options)
    assert got.dtype == query.dtype
    expected = reference(query, keys, values, lengths, scale, **options)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[query.dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
def test_ragged_rows_attend_to_their_own_live_positions(group: int, dtype: torch.dtype) -> None:
    keys, values = cache(LENGTHS, 2, 64, dtype=dtype)
    query = normal(len(LENGTHS), 2 * group, 64, dtype=dtype)
    assert_equals_reference(query, keys, values, int32(LENGTHS))


@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16])
def test_any_head_dim_is_served(head_dim: int, dtype: torch.dtype) -> None:
    keys, values = cache(LENGTHS, 1, head_dim, dtype=dtype)
    query = normal(len(LENGTHS), 3, head_dim, dtype=dtype)
    assert_equals_reference(query, keys, values, int32(LENGTHS))


@pytest.mark.parametrize("heads", [20, 71])
def test_more_heads_may_share_a_kv_head_than_a_matrix_product_has_rows(heads: int) -> None:
    keys, values = cache([5, 40], 1, 64, capacity=40)
    assert_equals_reference(normal(2, heads, 64), keys, values, int32([5, 40]))


@pytest.mark.parametrize("capacity", [1, 24, 256])
def test_a_cache_of_one_split_needs_no_combining(capacity: int) -> None:
    lengths = [capacity, 0, 1]
    keys, values = cache(lengths, 2, 32, capacity=capacity)
    assert_equals_reference(normal(3, 4, 32), keys, values, int32(lengths))


def test_a_long_cache_is_split_at_most_32_times() -> None:
    lengths = [9000, 0, 513]
    keys, values = cache(lengths, 1, 16, capacity=9000)
    assert_equals_reference(normal(3, 2, 16), keys, values, int32(lengths))


OPTIONS = {
    "window of one": {"window": 1},
    "window within a split": {"window": 20},
    "window across splits": {"window": 280},
    "window beyond the cache": {"window": 1000},
    "softcap": {"softcap": 2.0},
    "slopes": {"slopes": [0.5, 0.25, 0.125, 0.0625]},
    "all": {"window": 280, "softcap": 2.0, "slopes": [0.5, 0.25, 0.125, 0.0625]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_window_softcap_and_slopes_mean_what_they_mean_in_plain_attention(options: dict[str, object]) -> None:
    keys, values = cache(LENGTHS, 2, 64)
    if "slopes" in options:
        options = options | {"slopes": torch.tensor(options["slopes"], device=DEVICE)}
    assert_equals_reference(3 * normal(len(LENGTHS), 4, 64), keys, values, int32(LENGTHS), **options)


def test_what_lies_before_the_window_is_not_read() -> None:
    keys, values = cache(LENGTHS, 2, 64)
    for slot, length in enumerate(LENGTHS):
        keys[slot, :, : max(0, length - 100)] = NAN
        values[slot, :, : max(0, length - 100)] = NAN
    assert_equals_reference(normal(len(LENGTHS), 4, 64), keys, values, int32(LENGTHS), window=100)


def test_scratch_memory_that_no_split_wrote_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(*args: object, **kwargs: object) -> Tensor:
        return allocate(*args, **kwargs).fill_(NAN)

    allocate: Callable[..., Tensor] = torch.empty
    keys, values = cache(LENGTHS, 2, 64)
    query, lengths = normal(len(LENGTHS), 4, 64), int32(LENGTHS)
    plain = decode_attention(query, keys, values, lengths, 0.125)
    monkeypatch.setattr(decode_kernel.torch, "empty", poisoned)
    assert torch.equal(decode_attention(query, keys, values, lengths, 0.125), plain)


@pytest.mark.parametrize("capacity", [CAPACITY, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BFLOAT16])
def test_a_row_is_the_same_to_the_last_bit_alone_and_in_any_company(capacity: int, dtype: torch.dtype) -> None:
    lengths = [min(length, capacity) for length in LENGTHS]
    keys, values = cache(lengths, 2, 64, capacity=capacity, dtype=dtype)
    query = normal(len(lengths), 4, 64, dtype=dtype)
    together = decode_attention(query, keys, values, int32(lengths), 0.125)
    for row in range(len(lengths)):
        own = slice(row, row + 1)
        alone = decode_attention(query[own], keys[own], values[own], int32(lengths[own]), 0.125)
        assert torch.equal(alone[0], together[row])
    fewer = decode_attention(query[:3], keys, values, int32(lengths), 0.125)
    assert torch.equal(fewer, together[:3])


def test_a_length_beyond_the_capacity_counts_as_the_capacity() -> None:
    keys, values = cache([CAPACITY], 1, 16)
    query = normal(1, 2, 16)
    full, beyond = (decode_attention(query, keys, values, int32([n]), 0.25) for n in (CAPACITY, CAPACITY + 7))
    assert torch.equal(beyond, full)


def test_a_query_may_be_strided_and_the_result_goes_where_it_is_told() -> None:
    keys, values = cache(LENGTHS, 2, 64)
    lengths = int32(LENGTHS)
    fused = normal(64, 9, len(LENGTHS)).permute(2, 1, 0)  # no dimension where it usually is
    query, out = fused[:, 2:6], torch.full((len(LENGTHS), 4, 64), NAN, device=DEVICE)
    got = decode_attention(query, keys, values, lengths, 0.125, out=out)
    assert got is out
    assert torch.equal(out, decode_attention(query.contiguous(), keys, values, lengths, 0.125))


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_newest_key_and_value_land_at_the_row_length_and_nowhere_else(head_dim: int, dtype: torch.dtype) -> None:
    keys, values = normal(2, 5, 3, 8, head_dim, dtype=dtype).unbind()
    expected_keys, expected_values = keys.clone(), values.clone()
    fused = normal(4, 7, head_dim, seed=2, dtype=dtype)
    key, value = fused[:, :3], fused[:, 3:6]
    for row, length in enumerate([0, 7, 3, 8]):  # the last row's slot is full
        expected_keys[row, :, length : length + 1] = key[row, :, None]
        expected_values[row, :, length : length + 1] = value[row, :, None]
    expected_keys[3], expected_values[3] = keys[3], values[3]
    lengths = int32([0, 7, 3, 8, 0])
    write_kv(key, value, keys, values, lengths)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    assert lengths.tolist() == [0, 7, 3, 8, 0]


def test_an_empty_batch_is_an_empty_result() -> None:
    keys, values = cache([4], 1, 16)
    nothing = normal(0, 1, 16)
    write_kv(nothing, nothing, keys, values, int32([4]))
    assert decode_attention(nothing, keys, values, int32([4]), 1.0).shape == (0, 1, 16)


def test_tensors_that_do_not_fit_are_refused_by_name() -> None:
    keys, values = cache([4], 2, 16)
    query, lengths = normal(1, 4, 16), int32([4])
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads evenly"):
        decode_attention(normal(1, 3, 16), keys, values, lengths, 1.0)
    with pytest.raises(ValueError, match=r"query is \[2, 4, 16\].*at most 1 slots"):
        decode_attention(normal(2, 4, 16), keys, values, lengths, 1.0)
    with pytest.raises(ValueError, match="query is torch.bfloat16, allowed is the cache's torch.float32"):
        decode_attention(query.bfloat16(), keys, values, lengths, 1.0)
    with pytest.raises(ValueError, match="keys are torch.float64, allowed are torch.float16"):
        decode_attention(query.double(), keys.double(), values.double(), lengths, 1.0)
    with pytest.raises(ValueError, match="lengths are .* torch.int64, allowed is .* torch.int32"):
        decode_attention(query, keys, values, lengths.long(), 1.0)
    with pytest.raises(ValueError, match="both must be contiguous"):
        decode_attention(query, keys.transpose(1, 2), values.transpose(1, 2), lengths, 1.0)
    with pytest.raises(ValueError, match="window is 0, allowed is a positive number"):
        decode_attention(query, keys, values, lengths, 1.0, window=0)
    with pytest.raises(ValueError, match="slopes are .* torch.float64, allowed is .* torch.float32"):
        decode_attention(query, keys, values, lengths, 1.0, slopes=torch.ones(4, dtype=torch.float64, device=DEVICE))
    with pytest.raises(ValueError, match="key has 1 heads, allowed is the cache's 2"):
        write_kv(normal(1, 1, 16), normal(1, 1, 16), keys, values, lengths)
    with pytest.raises(ValueError, match=r"value is \[1, 1, 16\], allowed is .* like key"):
        write_kv(normal(1, 2, 16), normal(1, 1, 16), keys, values, lengths)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("window", [None, 100])
def test_a_captured_step_follows_lengths_that_change_between_replays(window: int | None) -> None:
    lengths = [299, 0, 31, 254, 255, 100]
    keys, values = cache(lengths, 2, 64, dtype=torch.bfloat16)
    query = normal(len(lengths), 8, 64, dtype=torch.bfloat16)
    key, value = normal(2, len(lengths), 2, 64, seed=2, dtype=torch.bfloat16).unbind()
    before, after = int32(lengths), int32([length + 1 for length in lengths])

    def step() -> Tensor:
        write_kv(key, value, keys, values, before)
        return decode_attention(query, keys, values, after, 0.125, window=window)

    step()  # compiles the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for grown in range(3):
        before += int(grown > 0)
        after += int(grown > 0)
        graph.replay()
        live = after.clamp(max=CAPACITY)
        expected = reference(query, keys, values, live, 0.125, window=window)
        torch.testing.assert_close(out.double(), expected, rtol=1.6e-2, atol=1.6e-2)
