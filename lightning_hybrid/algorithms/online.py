"""What the algorithms that learn from their own rollouts have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from lightning_hybrid.algorithms.judged import Credit, Judged
from lightning_hybrid.algorithms.optimizer import Aggregation, Betas, OpenUnit, Schedule
from lightning_hybrid.rl import policy_loss
from lightning_hybrid.settings import Problem, Rule, Settings

AtLeastOne = Annotated[float, Field(ge=1.0)]
AboveOne = Annotated[float, Field(gt=1.0)]


def _adaptive_control_needs_a_start(config: OnlineConfig) -> Problem | None:
    if config.kl_target is None or config.kl_coef > 0:
        return None
    return Problem("kl_coef", "must be above 0 when kl_target is set: the controller multiplies it", "0")


def _importance_weights_need_a_second_opinion(config: OnlineConfig) -> Problem | None:
    if config.importance_cap is None or config.old_logprobs != "rollout":
        return None
    remedy = "compares the rollout's log-probs with recomputed ones: use old_logprobs=recompute, or null for no weights"
    return Problem("importance_cap", remedy, f"{config.importance_cap} with old_logprobs='rollout'")


def _kl_needs_a_reference(config: OnlineConfig) -> Problem | None:
    if config.reference or config.kl_coef == 0:
        return None
    return Problem("reference", f"must be true with kl_coef={config.kl_coef:g}: the KL is to the reference", "False")


def _name_is_of_the_class(config: OnlineConfig) -> Problem | None:
    name = type(config).model_fields["name"].default
    return None if config.name == name else Problem("name", f"{type(config).__name__} is {name!r}", repr(config.name))


def _kl_loss_needs_a_gradient(config: OnlineConfig) -> Problem | None:
    if config.kl_placement == "reward" or config.kl_coef == 0 or config.kl_estimator != "k1":
        return None
    return Problem("kl_estimator", "k1 as a loss pulls nowhere (its mean gradient is 0): use k2 or k3", "'k1'")


class OnlineConfig(Settings):
    """An algorithm: its settings, how it gives credit (:meth:`credit`), and its policy's loss (:meth:`policy_loss`).

    One iteration samples ``group_size`` responses to each prompt of a batch, scores them, gives each token credit, and
    takes ``epochs × minibatches`` optimizer steps.
    """

    rules: ClassVar[tuple[Rule, ...]] = (
        _adaptive_control_needs_a_start,
        _importance_weights_need_a_second_opinion,
        _kl_loss_needs_a_gradient,
        _kl_needs_a_reference,
        _name_is_of_the_class,
    )
    critic: ClassVar[bool] = False
    """whether a critic is trained beside the policy"""

    name: str
    """which algorithm this is"""
    group_size: PositiveInt = 1
    """responses sampled to each prompt"""
    reference: bool = True
    """keep the policy as it starts, frozen, to charge the KL to it, or to log it; without, kl_coef must be 0"""
    kl_coef: NonNegativeFloat = 0.05
    """weight of the KL penalty"""
    kl_placement: Literal["reward", "loss"] = "reward"
    """where the KL is charged: reward (k1, off the reward of each token), loss (kl_estimator, as a term of its own)"""
    kl_target: PositiveFloat | None = None
    """KL in nats per response that an adaptive kl_coef aims at (Ziegler et al. 2019, section 2.2); null: fixed"""
    kl_horizon: PositiveInt = 10_000
    """samples over which the adaptive kl_coef may change by a fifth; above a fifth of those of one iteration"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL that is logged, that kl_target refers to, and of a KL loss (Schulman 2020)"""
    clip_low: OpenUnit = 0.2
    """the policy ratio is clipped below at 1 - clip_low"""
    clip_high: PositiveFloat = 0.2
    """the policy ratio is clipped above at 1 + clip_high"""
    entropy_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus"""
    ptx_coef: NonNegativeFloat = 0.0
    """weight of the PTX loss: next-token loss on the texts of ptx.path (Ouyang et al. 2022, equation 2)"""
    reward_clip: PositiveFloat | None = None
    """scores are limited to [-reward_clip, reward_clip]; null for no limit"""
    normalize_reward: bool = False
    """divide scores by their running standard deviation"""
    missing_eos_penalty: NonNegativeFloat | None = None
    """taken off the score of a response that did not end; null for none"""
    overlong_buffer: PositiveInt | None = None
    """the last tokens before rollout.max_new_tokens in which a penalty grows from 0 to overlong_penalty (Yu et al. \
2025, "DAPO", equation 13); null for none"""
    overlong_penalty: NonNegativeFloat = 1.0
    """taken off the score of a response of rollout.max_new_tokens tokens, with overlong_buffer"""
    epochs: PositiveInt = 1
    """passes over one rollout batch"""
    minibatch_size: PositiveInt | None = None
    """sequences of one optimizer step over all ranks; null for the whole rollout batch"""
    micro_batch_size: PositiveInt = 8
    """sequences of one forward pass on one rank: memory only, the result stays the same"""
    aggregation: Aggregation = "token_mean"
    """how token losses become one number"""
    early_stop_kl: PositiveFloat | None = None
    """an update ends early when the policy moved this far (nats per token) from the rollout's; null for never"""
    old_logprobs: Literal["auto", "rollout", "recompute"] = "auto"
    """where the log-probs of the policy that sampled come from: the rollout, which saves a forward pass, or that \
pass; auto measures, takes the rollout's while they are within old_logprob_tolerance, and says so"""
    old_logprob_tolerance: PositiveFloat = 1e-3
    """mean |difference| (nats per token) to the training forward up to which auto takes the rollout's log-probs"""
    importance_cap: AtLeastOne | None = None
    """multiply each token's policy loss by its probability in training over the one it was sampled with, at most \
this (truncated importance sampling, Yao et al. 2025); always recomputes old log-probs; null for no weights"""
    actor_lr: PositiveFloat = 1e-5
    """peak learning rate of the policy"""
    weight_decay: NonNegativeFloat = 0.0
    """decoupled weight decay of every optimizer"""
    betas: Betas = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    warmup_steps: NonNegativeInt = 0
    """iterations of linear warm-up"""
    schedule: Schedule = "constant"
    """shape of the learning rates after the warm-up; cosine and linear end at 0 with the last iteration"""
    max_grad_norm: PositiveFloat | None = 1.0
    """gradients are scaled down to this norm; null for no limit"""
    logprob_chunk: PositiveInt = 1024
    """tokens whose logits exist at once: memory only, the result stays the same"""

    @abstractmethod
    def credit(self, judged: Judged) -> Credit:
        """What each token did for the score of its response."""

    def policy_loss(self, logprobs: Tensor, old_logprobs: Tensor, **terms: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss and its metrics; terms and result are those of :func:`~lightning_hybrid.rl.policy_loss`."""
        return policy_loss(
            logprobs,
            old_logprobs,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            aggregation=self.aggregation,
            **terms,
        )
