"""The losses of one micro-batch: of the policy with its further terms, and of the critic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_hybrid.algorithms import PPOConfig
from lightning_hybrid.modules.experience import Experience, state_values
from lightning_hybrid.rl import aggregate, estimate_kl, value_loss

if TYPE_CHECKING:
    from lightning_hybrid.models import PolicyOutput
    from lightning_hybrid.modules.ppo import PPOModule


def policy_terms(module: PPOModule, part: Experience, denominator: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The policy's whole loss, its log-probs of the tokens, and what is logged.

    Args:
        module: whose actor to train.
        part: the micro-batch.
        denominator: 0-dim, what the minibatch's sums are divided by.

    Returns:
        The loss 0-dim, log-probs ``[batch, time]``, and detached 0-dim figures: losses as they are, others summed over
        the valid tokens.
    """
    config = module.config
    output: PolicyOutput = module.actor(
        part.tokens, part.attention_mask, part.mask, temperature=module.rollout_config.temperature
    )
    loss, metrics = config.policy_loss(
        output.logprobs,
        part.old_logprobs,
        advantages=part.advantages,
        mask=part.mask,
        norm=_longest(module),
        denominator=denominator,
        weights=part.weights,
    )
    tokens = part.mask.sum()
    figures = {
        "policy_loss": loss.detach(),
        "entropy": (output.entropy.detach() * part.mask).sum(),
        "ratio_max": metrics["ratio_max"],
        **{name: metrics[name] * tokens for name in ("clip_fraction", "ratio_mean", "approx_kl")},
    }
    if config.entropy_coef:
        loss = loss - config.entropy_coef * _aggregated(module, output.entropy, part, denominator)
    if config.kl_placement == "loss" and part.ref_logprobs is not None:
        kl = estimate_kl(output.logprobs, part.ref_logprobs, config.kl_estimator)
        term = _aggregated(module, kl, part, denominator)
        loss = loss + module.kl_controller.value * term
        figures["kl_loss"] = term.detach()
    return loss, output.logprobs.detach(), figures


def value_terms(module: PPOModule, part: Experience, denominator: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss, 0-dim, and detached figures like those of :func:`policy_terms`.

    Raises:
        ValueError: The module has no critic.
    """
    config = module.config
    if not isinstance(config, PPOConfig) or module.critic is None or part.values is None or part.returns is None:
        raise ValueError(f"algorithm {config.name!r} trains no critic")
    loss, metrics = value_loss(
        state_values(module.critic(part.tokens, part.attention_mask), part.mask),
        part.values,
        part.returns,
        part.mask,
        config.value_clip,
        config.aggregation,
        norm=_longest(module),
        denominator=denominator,
    )
    return loss, {
        "value_loss": loss.detach(),
        "value_clip_fraction": metrics["value_clip_fraction"] * part.mask.sum(),
    }


def _aggregated(module: PPOModule, x: Tensor, part: Experience, denominator: Tensor) -> Tensor:
    """Values of tokens ``[batch, time]`` as one number, the way that the policy's losses are."""
    return aggregate(x, part.mask, module.config.aggregation, norm=_longest(module), denominator=denominator)


def _longest(module: PPOModule) -> float:
    return float(module.rollout_config.max_new_tokens)
