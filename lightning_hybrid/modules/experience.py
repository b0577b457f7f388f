"""What a policy learns from: a rollout with scores, log-probs, values, rewards and advantages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.algorithms import Judged
from lightning_hybrid.errors import ServerError
from lightning_hybrid.generation import used_columns
from lightning_hybrid.modules.passes import critic_values, policy_logprobs
from lightning_hybrid.modules.reference import ServedReference
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


@dataclass(frozen=True)
class Experience:
    """One rank's share of an iteration. All ``[batch, time]`` tensors are 0 where ``mask`` is False.

    Attributes:
        tokens: ``[batch, time]`` long, left-padded prompts and right-padded responses.
        attention_mask: ``[batch, time]`` bool, True on real tokens.
        mask: ``[batch, time]`` bool, True on response tokens: what is trained on.
        scores: ``[batch]`` float32, one per response, as they entered the token rewards.
        old_logprobs: ``[batch, time]`` float32, under the policy that sampled.
        rewards: ``[batch, time]`` float32, KL penalty on every token where it is charged there, score on the last.
        advantages: ``[batch, time]`` float32.
        ref_logprobs: ``[batch, time]`` float32, under the frozen reference; None without one.
        values: ``[batch, time]`` float32, the critic's value of the state before each token; None without a critic.
        returns: ``[batch, time]`` float32, what the critic should have said; None without a critic.
        weights: ``[batch, time]`` float32, factors of the policy's token losses; None where there are none.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    scores: Tensor
    old_logprobs: Tensor
    rewards: Tensor
    advantages: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None
    weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def rows(self, index: Tensor) -> Experience:
        """The rows ``index`` (long ``[n]``), less the columns that are padding in all of them."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        picked = {name: tensor[index] for name, tensor in held.items() if tensor is not None}
        columns = used_columns(picked["attention_mask"])
        return Experience(**{k: v if v.dim() == 1 else v[:, columns] for k, v in picked.items()})


@torch.no_grad()
def gain_experience(module: PPOModule, rollout: Rollout, scores: Tensor, group: Tensor) -> Experience:
    """Add log-probs, values, rewards and advantages to a rollout.

    Args:
        module: whose models to ask, and whose algorithm.
        rollout: of this rank.
        scores: ``[batch]`` float32.
        group: ``[batch]`` long, equal for responses to the same prompt.
    """
    config, mask = module.config, rollout.response_mask
    size, temperature, source = config.micro_batch_size, module.rollout_config.temperature, module.old_logprob_source
    again, reference = source.recompute, reference_logprobs(module, rollout)
    old = policy_logprobs(module.actor, rollout, size, temperature) if again else source.of_rollout(rollout)
    values = None
    if module.critic is not None:
        module._engine("critic").eval()  # without dropout, as the actor already is
        values = state_values(critic_values(module.critic, rollout, size), mask)
    ref = reference()
    price = module.kl_controller.value if config.kl_placement == "reward" else 0.0
    credit = config.credit(Judged(scores, group, mask, old, ref, values, price, module.sum_over_ranks))
    return Experience(
        tokens=rollout.tokens,
        attention_mask=rollout.attention_mask,
        mask=mask,
        scores=scores,
        old_logprobs=old,
        rewards=credit.rewards,
        advantages=credit.advantages,
        ref_logprobs=ref,
        values=values,
        returns=credit.returns,
        weights=source.importance_weights(old, rollout),
    )


def reference_logprobs(module: PPOModule, rollout: Rollout) -> Callable[[], Tensor | None]:
    """What returns the reference's log-probs, ``[batch, time]`` float32; None without a reference.

    One in a process of its own begins now, beside what the ranks compute until they call this; all of them call it.
    """
    reference, size, temperature = module.reference, module.config.micro_batch_size, module.rollout_config.temperature
    if isinstance(reference, ServedReference):
        begun = reference.begin(rollout, size, temperature)
        return lambda: module.separate.on_every_rank(begun, "the reference", ServerError)
    return lambda: None if reference is None else policy_logprobs(reference, rollout, size, temperature)


def state_values(values: Tensor, mask: Tensor) -> Tensor:
    """Align a critic's output with the tokens: the value before token ``t`` is what the critic says at ``t - 1``."""
    shifted = torch.roll(values, 1, dims=1)
    return shifted.masked_fill(~mask, 0.0)
