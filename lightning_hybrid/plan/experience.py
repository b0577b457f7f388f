"""What an iteration remembers of its responses, token by token."""

from __future__ import annotations

from lightning_hybrid.plan.held import Held
from lightning_hybrid.plan.setup import FP32, Setup

# Token, which of prompt and response it is, and the log-probs of sampling and of the policy.
OF_ROLLOUT = 8 + 2 + 2 * FP32
# A mask; old log-prob, reward and advantage.
OF_EXPERIENCE = 1 + 3 * FP32


def last_rollout(setup: Setup) -> list[Held]:
    """The responses of the iteration before, which stay for callbacks to show."""
    return [Held("actor", "buffers", setup.rows * setup.tokens * OF_ROLLOUT)]


def rollout(setup: Setup) -> list[Held]:
    """Those of the iteration before and of this one: all that are sampled, also where some are not learned from."""
    return [*last_rollout(setup), Held("actor", "buffers", setup.drawn * setup.tokens * OF_ROLLOUT)]


def experience(setup: Setup) -> list[Held]:
    """What is learned from, with log-probs of the reference, and values and returns, where there are any."""
    algorithm = setup.run.algorithm
    further = algorithm.reference + 2 * algorithm.critic + (algorithm.importance_cap is not None)
    token = OF_EXPERIENCE + FP32 * further
    return [*rollout(setup), Held("actor", "buffers", setup.rows * setup.tokens * token)]
