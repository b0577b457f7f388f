"""What a checkpoint keeps of a PPO module beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_hybrid.data.checking import notice

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def state_of(module: PPOModule) -> dict[str, Any]:
    """The KL controller, the moments of the scores, the choice of old log-probs, and prompts that are carried over.

    Of frozen models in processes of their own it has a digest, as the strategy has one of those in the ranks.
    """
    state = {
        "kl": module.kl_controller.state_dict(),
        "scores": module.score_moments.state_dict(),
        "old_logprobs": module.old_logprob_source.state_dict(),
        "optimizer_steps": module.optimizer_steps,
        "separate": module.separate.weights,
    }
    return state if module.pipeline is None else state | {"carried_over": module.pipeline.state_dict()}


def restore_state(module: PPOModule, state: Mapping[str, Any]) -> None:
    """Go on with what :func:`state_of` gave.

    Raises:
        CheckpointError: where a frozen model in a process of its own is another one.
    """
    module.separate.refuse_other_weights(state.get("separate", {}))
    module.kl_controller.load_state_dict(state["kl"])
    module.score_moments.load_state_dict(state["scores"])
    module.moments_now = module.score_moments
    # Older checkpoints hold no choice.
    module.old_logprob_source.load_state_dict(state.get("old_logprobs", {}))
    module.optimizer_steps = state["optimizer_steps"]
    carried_over = state.get("carried_over", [])
    if module.pipeline is not None:
        module.pipeline.load_state_dict(carried_over)
    elif carried_over and module.trainer.training:
        notice(
            f"the checkpoint holds {len(carried_over)} prompts that were carried over, and rollout.max_staleness=0 "
            "does not learn from them; as many of the first batch are learned from twice: set it above 0 for neither"
        )
