"""State that lives from one iteration to the next: the KL coefficient, and moments of the rewards."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from lightning_hybrid.rl.masking import VARIANCE_EPS

ERROR_LIMIT = 0.2


class KLController(Protocol):
    """What sets the price of one nat of KL."""

    @property
    def value(self) -> float:
        """The coefficient to use now."""

    def update(self, current_kl: float, n_steps: int) -> None:
        """Takes in the KL that was measured over ``n_steps`` sequences."""

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint needs."""

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a checkpoint."""


class FixedKLController:
    """A coefficient that stays what the configuration says, also when a checkpoint held another one."""

    def __init__(self, value: float) -> None:
        """Keeps ``value`` (at least 0); raises ValueError otherwise."""
        if not 0 <= value < math.inf:
            raise ValueError(f"the KL coefficient is {value}, allowed are finite numbers from 0 up")
        self._value = value

    @property
    def value(self) -> float:
        """The coefficient."""
        return self._value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Changes nothing."""

    def state_dict(self) -> dict[str, float]:
        """Returns the coefficient, so that an adaptive controller can go on from it."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Changes nothing: a fixed coefficient comes from the configuration."""


class AdaptiveKLController:
    """Proportional control of the KL towards a target (Ziegler et al. 2019, section 2.2).

    Each update multiplies the coefficient by ``1 + e * n_steps / horizon``, with ``e = current_kl / target - 1``
    clipped to ±0.2.
    """

    def __init__(self, init: float, target: float, horizon: float) -> None:
        """Starts at ``init``.

        Args:
            init: First coefficient, above 0 (0 could never grow).
            target: KL to hold, above 0, in the unit that ``update`` will be given.
            horizon: Number of sequences over which the coefficient may change by a factor of about ``1 ± 0.2``.

        Raises:
            ValueError: One of them is not a positive finite number.
        """
        for name, given in (("init", init), ("target", target), ("horizon", horizon)):
            if not 0 < given < math.inf:
                raise ValueError(f"{name} of the adaptive KL controller is {given}, allowed are positive numbers")
        self._value = init
        self._target = target
        self._horizon = horizon

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        return self._value

    def update(self, current_kl: float, n_steps: int) -> None:
        """Raises the coefficient where the KL is above the target, and lowers it where it is below.

        Args:
            current_kl: KL measured with the current policy, in the unit of the target.
            n_steps: Number of sequences it was measured over, on all ranks.

        Raises:
            ValueError: The KL is NaN, or ``n_steps`` is negative or so large that the coefficient could reach 0.
        """
        if math.isnan(current_kl):
            raise ValueError("current_kl is nan, allowed are numbers: the log-probabilities it came from are broken")
        if not 0 <= n_steps * ERROR_LIMIT < self._horizon:
            raise ValueError(
                f"n_steps is {n_steps} with a horizon of {self._horizon}, allowed are 0 up to five horizons "
                "(not included): raise the horizon"
            )
        error = min(max(current_kl / self._target - 1, -ERROR_LIMIT), ERROR_LIMIT)
        self._value *= 1 + error * n_steps / self._horizon

    def state_dict(self) -> dict[str, float]:
        """Returns the coefficient; target and horizon come from the configuration."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from the coefficient of a checkpoint."""
        self._value = state["value"]


def moments(x: Tensor) -> Tensor:
    """Count, mean and sum of squared deviations of ``x``, ready to be gathered from the ranks and merged in any order.

    Args:
        x: Float, any shape; finite.

    Returns:
        Float64[3]: count, mean, m2 (zeros for an empty ``x``).
    """
    x = x.detach().double()
    count = x.new_tensor(float(x.numel()))
    mean = x.sum() / count.clamp(min=1)
    return torch.stack((count, mean, (x - mean).square().sum()))


class RunningMoments:
    """Mean and variance of all numbers seen so far, by merging chunks (Chan et al. 1979, the parallel update)."""

    def __init__(self) -> None:
        """Starts empty."""
        self.count = 0.0
        self.mean = 0.0
        self.m2 = 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation; 1 until two numbers have been seen."""
        return math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 1.0

    @property
    def scale(self) -> float:
        """What to divide numbers by, to give them unit variance: :attr:`std`, or 1 where they have all been equal."""
        rounding = 1e-6 * max(abs(self.mean), 1.0)
        return self.std if self.std > rounding else 1.0

    def update(self, count: float, mean: float, m2: float) -> None:
        """Merges a chunk, as :func:`moments` describes it; one call for each rank merges the ranks.

        Args:
            count: How many numbers the chunk holds; 0 changes nothing.
            mean: Their mean.
            m2: Their sum of squared deviations from that mean.

        Raises:
            ValueError: One of the three is NaN or infinite, or ``count`` or ``m2`` is negative.
        """
        if not all(map(math.isfinite, (count, mean, m2))) or count < 0 or m2 < 0:
            raise ValueError(
                f"moments are count={count}, mean={mean}, m2={m2}, allowed are finite ones, count, m2 >= 0"
            )
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean += delta * count / total
        self.m2 += m2 + delta**2 * self.count * count / total
        self.count = total

    def normalize(self, x: Tensor) -> Tensor:
        """Returns ``(x - mean) / sqrt(variance + 1e-8)``, in the shape and dtype of ``x``."""
        return (x - self.mean) / math.sqrt(self.std**2 + VARIANCE_EPS)

    def state_dict(self) -> dict[str, float]:
        """Returns count, mean and m2."""
        return {"count": self.count, "mean": self.mean, "m2": self.m2}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a checkpoint."""
        self.count, self.mean, self.m2 = state["count"], state["mean"], state["m2"]
