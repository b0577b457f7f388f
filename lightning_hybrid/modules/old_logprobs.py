"""Where old log-probs come from: the rollout, or one more forward pass of the model that sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hybrid.algorithms import OnlineConfig
from lightning_hybrid.config import RolloutConfig
from lightning_hybrid.config.sampling import rollout_lacks_old_logprobs
from lightning_hybrid.data.checking import notice
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.modules.experience import Experience
from lightning_hybrid.rl import logprob_gap, truncated_importance_weights
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


@dataclass(frozen=True)
class LogprobGap:
    """How far the rollout's log-probs are from the training forward's, over tokens of all ranks.

    Attributes:
        mean: of |Δ|, nats per token.
        largest: |Δ|, nats.
        outside: share of tokens whose ratio exp(training - rollout) is outside [0.9, 1.1].
    """

    mean: float
    largest: float
    outside: float

    def __str__(self) -> str:
        spread = f"max {self.largest:.2g}, {self.outside:.2%} of ratios outside [0.9, 1.1]"
        return f"mean |Δ| {self.mean:.2g} nats per token, {spread}"

    def metrics(self) -> dict[str, float]:
        """The figures under the names that they are logged by."""
        return {
            "rollout/logprob_gap_mean": self.mean,
            "rollout/logprob_gap_max": self.largest,
            "rollout/ratio_outside": self.outside,
        }


def measured_gap(
    module: PPOModule, rollout: Rollout, experience: Experience, first_pass: dict[str, Tensor]
) -> LogprobGap:
    """This iteration's gap: over all tokens where old log-probs were recomputed, else over the first minibatch's.

    Args:
        module: that trains.
        rollout: this rank's.
        experience: made of it.
        first_pass: this rank's sums over the update's first minibatch, whose forward pass runs anyway, see
            :attr:`~lightning_hybrid.modules.update.PPOUpdate.gap`.
    """
    source = module.old_logprob_source
    if not source.recompute:
        return _over_ranks(module, first_pass)
    return _over_ranks(module, logprob_gap(experience.old_logprobs, source.of_rollout(rollout), experience.mask))


def _over_ranks(module: PPOModule, sums: dict[str, Tensor]) -> LogprobGap:
    """The gap from the sums of every rank; equal on all of them."""
    largest = module.trainer.strategy.reduce(sums["gap_max"].clone(), reduce_op="max")
    added = module.sum_over_ranks(torch.stack([sums["gap"], sums["outside"], sums["tokens"]]))
    total, outside, tokens = added.tolist()
    return LogprobGap(total / tokens, float(largest), outside / tokens)


class OldLogprobSource:
    """Decide, from one iteration to the next, whether old log-probs are recomputed or taken from the rollout.

    ``auto`` begins with recomputing and takes the rollout's while the mean gap is within tolerance, which bounds the
    rare large ones too: of 1e-3, at most 1.1% of the ratios are outside [0.9, 1.1]. It says what it chose, and says it
    again when the choice changes.

    Args:
        config: of the algorithm.
        rollout: of the sampling.

    Raises:
        ConfigError: if the rollout is to give old log-probs that it does not know.
    """

    def __init__(self, config: OnlineConfig, rollout: RolloutConfig) -> None:
        self.config = config
        # vLLM knows those of the distribution that it drew from, and no others.
        self.at_one = rollout.temperature == 1.0 and rollout.backend != "vllm"
        obstacle = rollout_lacks_old_logprobs(rollout)
        if obstacle is not None and config.old_logprobs == "rollout":
            raise ConfigError(f"old_logprobs='rollout' is not possible: {obstacle}; use recompute or auto")
        if config.importance_cap is not None:
            obstacle = f"importance_cap={config.importance_cap} compares them with the rollout's"
        self._obstacle = obstacle
        self._trusted = config.old_logprobs == "rollout"
        self._said: bool | None = None

    @property
    def recompute(self) -> bool:
        """Whether this iteration runs the forward pass."""
        return not self._trusted

    def of_rollout(self, rollout: Rollout) -> Tensor:
        """The rollout's own log-probs to hold against old ones, ``[batch, time]`` float32, 0 outside the responses.

        At temperature 1 those under the raw policy, else those of the distribution that was drawn from, which a cut-off
        moves away from the training forward's.
        """
        logprobs = rollout.policy_logprobs if self.at_one else rollout.sampling_logprobs
        return logprobs.masked_fill(~rollout.response_mask, 0.0)

    def importance_weights(self, old: Tensor, rollout: Rollout) -> Tensor | None:
        """Factors of the policy loss, ``[batch, time]`` float32, against the distribution drawn from; None for none."""
        cap = self.config.importance_cap
        if cap is None:
            return None
        return truncated_importance_weights(old, rollout.sampling_logprobs, rollout.response_mask, cap)

    def judge(self, gap: LogprobGap) -> None:
        """Choose for the next iteration by this one's gap; without effect unless the setting is ``auto``."""
        if self.config.old_logprobs != "auto":
            return
        # A gap that is not a number is not within tolerance.
        self._trusted = self._obstacle is None and gap.mean <= self.config.old_logprob_tolerance
        if self._trusted is not self._said:
            self._said = self._trusted
            notice(self._choice(gap))

    def _choice(self, gap: LogprobGap) -> str:
        if self._obstacle is not None:
            return f"old_logprobs=auto: recomputed in every iteration, because {self._obstacle}"
        tolerance = f"old_logprob_tolerance={self.config.old_logprob_tolerance:g}"
        if self._trusted:
            choice, advice = f"from the rollout, within {tolerance}, saving a forward pass", ""
        else:
            choice, advice = f"recomputed, not within {tolerance}", "; importance_cap corrects for such a gap"
        return f"old_logprobs=auto: {choice} (rollout against training: {gap}){advice}"

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {"trusted": self._trusted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the choice of a checkpoint, where the configuration still leaves one."""
        if self.config.old_logprobs == "auto" and self._obstacle is None:
            self._trusted = bool(state.get("trusted", False))
