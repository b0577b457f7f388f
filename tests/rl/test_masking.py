from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lightning_hybrid.rl import masked_mean, whiten

NAN = float("nan")


def f64(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_masked_mean_counts_only_the_true_positions() -> None:
    x = f64([1.0, 2.0, NAN], [4.0, 100.0, 5.0])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    # (1 + 2 + 4 + 5) / 4 = 3; rows: 3/2 and 9/2; columns: 5/2, 2/1, 5/1
    assert masked_mean(x, mask).item() == 3.0
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 4.5]
    assert masked_mean(x, mask, dim=0).tolist() == [2.5, 2.0, 5.0]
    assert masked_mean(x, mask).dtype == torch.float64


def test_masked_mean_of_nothing_is_zero_and_so_is_its_gradient() -> None:
    x = f64([NAN, 1.0], [3.0, 5.0]).requires_grad_()
    mask = torch.tensor([[False, False], [True, True]])
    means = masked_mean(x, mask, dim=1)
    assert means.tolist() == [0.0, 4.0]
    means.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0], [0.5, 0.5]]
    assert masked_mean(x, torch.zeros_like(mask)).item() == 0.0


def test_masked_mean_in_half_precision_is_computed_in_float32() -> None:
    x = torch.ones(1, 4096, dtype=torch.bfloat16)
    x[0, 0] = 2.0
    mean = masked_mean(x, torch.ones_like(x, dtype=torch.bool))
    assert mean.dtype == torch.float32
    assert mean.item() == 4097 / 4096


def test_whiten_uses_the_unbiased_variance_of_the_valid_positions() -> None:
    x = f64([1.0, 3.0, NAN], [8.0, 99.0, 99.0])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    # mean (1 + 3 + 8) / 3 = 4; squares 9 + 1 + 16 = 26; variance 26 / (3 - 1) = 13
    scale = 1 / math.sqrt(13 + 1e-8)
    torch.testing.assert_close(whiten(x, mask), f64([-3 * scale, -1 * scale, 0], [4 * scale, 0, 0]))
    expected = f64([4 - 3 * scale, 4 - scale, 0], [4 + 4 * scale, 0, 0])
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), expected)


@pytest.mark.parametrize(("valid", "shift_mean", "expected"), [(1, True, 0.0), (1, False, 7.0), (0, True, 0.0)])
def test_whiten_with_fewer_than_two_valid_positions_only_shifts(valid: int, shift_mean: bool, expected: float) -> None:
    mask = torch.arange(3).unsqueeze(0) < valid
    assert whiten(f64([7.0, 5.0, 5.0]), mask, shift_mean).tolist() == [[expected, 0.0, 0.0]]


def test_whiten_of_equal_values_is_zero() -> None:
    x = torch.full((2, 3), 1e4)
    assert whiten(x, torch.ones(2, 3, dtype=torch.bool)).abs().max() == 0


def test_whiten_keeps_the_variance_of_values_far_from_zero() -> None:
    # mean 1000.5, each 0.5 off: variance 4 * 0.25 / 3 = 1/3, though a sum of squares in float32 would lose it
    x = torch.tensor([[1000.0, 1001.0], [1000.0, 1001.0]])
    whitened = whiten(x, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(whitened.abs(), torch.full((2, 2), 0.5 * math.sqrt(3.0)))


def test_whiten_over_two_ranks_equals_whiten_of_all_the_data() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    mask = torch.rand(4, 5) < 0.6
    barrier = threading.Barrier(2, timeout=20)
    slots: dict[int, torch.Tensor] = {}

    def whiten_part(rank: int) -> torch.Tensor:
        def all_reduce(statistic: torch.Tensor) -> torch.Tensor:
            slots[rank] = statistic
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        rows = slice(0, 1) if rank == 0 else slice(1, 4)
        return whiten(x[rows], mask[rows], reduce=all_reduce)

    with ThreadPoolExecutor(2) as ranks:
        together = torch.cat(list(ranks.map(whiten_part, range(2))))
    torch.testing.assert_close(together, whiten(x, mask))


def test_whiten_is_differentiable() -> None:
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    assert torch.autograd.gradcheck(lambda t: whiten(t, mask), x)
    assert torch.autograd.gradcheck(lambda t: masked_mean(t, mask, dim=1), x)


def test_a_mask_that_is_not_boolean_is_refused() -> None:
    with pytest.raises(ValueError, match=r"mask has dtype torch.int64, allowed is torch.bool"):
        masked_mean(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.int64))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has shape \[1, 3\], allowed is the mask's \[1, 2\]"):
        whiten(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))
