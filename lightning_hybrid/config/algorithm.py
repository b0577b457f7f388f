"""Settings of the learning algorithms, each used on its own in Python too: `PPOConfig(kl_coef=0.05)`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from lightning_hybrid.settings import Problem, Rule, Settings

Schedule = Literal["constant", "cosine", "linear"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
UnitInterval = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
OpenUnit = Annotated[float, Field(gt=0.0, lt=1.0)]
# YAML has lists only, so a pair may be given as one.
Betas = Annotated[tuple[BelowOne, BelowOne], Field(strict=False)]


class OptimizerConfig(Settings):
    """AdamW (Loshchilov and Hutter 2019) and its learning-rate schedule."""

    lr: PositiveFloat = 1e-5
    """peak learning rate"""
    weight_decay: NonNegativeFloat = 0.0
    """decoupled weight decay"""
    betas: Betas = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    warmup_steps: NonNegativeInt = 0
    """optimizer steps of linear warm-up"""
    schedule: Schedule = "constant"
    """shape of the learning rate after the warm-up; cosine and linear end at 0 with the last step"""


class SFTConfig(OptimizerConfig):
    """Supervised fine-tuning: next-token loss on responses only."""


class RewardConfig(OptimizerConfig):
    """Reward modelling: the Bradley-Terry preference loss (Ouyang et al. 2022, eq. 1)."""


def _adaptive_control_needs_a_start(config: PPOConfig) -> Problem | None:
    if config.kl_target is None or config.kl_coef > 0:
        return None
    return Problem("kl_coef", "must be above 0 when kl_target is set: the controller multiplies it", "0")


def _importance_weights_need_a_second_opinion(config: PPOConfig) -> Problem | None:
    if config.importance_cap is None or config.old_logprobs != "rollout":
        return None
    remedy = "compares the rollout's log-probs with recomputed ones: use old_logprobs=recompute, or null for no weights"
    return Problem("importance_cap", remedy, f"{config.importance_cap} with old_logprobs='rollout'")


class PPOConfig(Settings):
    """Proximal policy optimization on token level with a KL penalty (Schulman et al. 2017; Ouyang et al. 2022).

    Example:
        >>> PPOConfig(kl_coef=0.02, epochs=2).clip_low
        0.2
    """

    rules: ClassVar[tuple[Rule, ...]] = (_adaptive_control_needs_a_start, _importance_weights_need_a_second_opinion)

    kl_coef: NonNegativeFloat = 0.05
    """weight of the KL penalty per token"""
    kl_target: PositiveFloat | None = None
    """KL in nats per response that an adaptive kl_coef aims at (Ziegler et al. 2019, section 2.2); null: fixed"""
    kl_horizon: PositiveInt = 10_000
    """samples over which the adaptive kl_coef may double"""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """estimator of the KL that is logged and that kl_target refers to (Schulman 2020); the penalty itself is k1"""
    gamma: UnitInterval = 1.0
    """discount of later rewards"""
    lam: UnitInterval = 0.95
    """lambda of generalized advantage estimation"""
    clip_low: OpenUnit = 0.2
    """the policy ratio is clipped below at 1 - clip_low"""
    clip_high: PositiveFloat = 0.2
    """the policy ratio is clipped above at 1 + clip_high"""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """bound on the loss of bad actions as a multiple of the advantage (Ye et al. 2020); null for none"""
    value_clip: PositiveFloat = 0.2
    """how far a value may move from the one of the rollout"""
    entropy_coef: NonNegativeFloat = 0.0
    """weight of the entropy bonus"""
    reward_clip: PositiveFloat | None = 5.0
    """scores are limited to [-reward_clip, reward_clip]; null for no limit"""
    normalize_reward: bool = False
    """divide scores by their running standard deviation"""
    whiten_advantages: bool = True
    """give the advantages of a rollout batch mean 0 and variance 1"""
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
    importance_cap: Annotated[float, Field(ge=1.0)] | None = None
    """multiply each token's policy loss by its probability in training over the one it was sampled with, at most \
this (truncated importance sampling, Yao et al. 2025); always recomputes old log-probs; null for no weights"""
    missing_eos_penalty: NonNegativeFloat | None = None
    """taken off the score of a response that did not end; null for none"""
    actor_lr: PositiveFloat = 1e-5
    """peak learning rate of the policy"""
    critic_lr: PositiveFloat = 1e-5
    """peak learning rate of the critic"""
    weight_decay: NonNegativeFloat = 0.0
    """decoupled weight decay of both optimizers"""
    betas: Betas = (0.9, 0.95)
    """decay rates of AdamW's two moments"""
    warmup_steps: NonNegativeInt = 0
    """PPO iterations of linear warm-up"""
    schedule: Schedule = "constant"
    """shape of the learning rates after the warm-up; cosine and linear end at 0 with the last iteration"""
    max_grad_norm: PositiveFloat | None = 1.0
    """gradients are scaled down to this norm; null for no limit"""
    critic_warmup_steps: NonNegativeInt = 0
    """first PPO iterations that train the critic only"""
    logprob_chunk: PositiveInt = 1024
    """tokens whose logits exist at once: memory only, the result stays the same"""
