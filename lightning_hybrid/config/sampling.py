"""What sampling asks of the rest of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.algorithms import GroupConfig, OnlineConfig
from lightning_hybrid.config.groups import RolloutConfig
from lightning_hybrid.config.roots import ranks_of
from lightning_hybrid.settings import Problem

if TYPE_CHECKING:
    from lightning_hybrid.config.ppo import PPORun


def vllm_engines_come_out_even(run: PPORun) -> Problem | None:
    """Every rank is part of one colocated engine."""
    ranks = ranks_of(run.trainer)
    if run.rollout.backend != "vllm" or ranks is None:
        return None
    problem = run.rollout.vllm.problem_with(ranks)
    return None if problem is None else Problem("rollout.vllm", problem)


def vllm_engines_are_reached(run: PPORun) -> Problem | None:
    """Processes of this machine listen on loopback only."""
    rollout, nodes = run.rollout, run.trainer.num_nodes
    if rollout.backend != "vllm" or rollout.vllm.colocate or nodes == 1 or run.launcher.name != "local":
        return None
    remedy = f"only the first of trainer.num_nodes={nodes} would reach the engines: use launcher=ray, or true"
    return Problem("rollout.vllm.colocate", remedy, "False")


def rollout_fits_workspace(run: PPORun) -> Problem | None:
    """The native backend's workspace bounds prompt and response together."""
    limit, asked = run.strategy.hybrid_engine.max_out_tokens, run.rollout.max_new_tokens + 1
    if run.rollout.backend != "native" or max(asked, run.data.max_length or 0) <= limit:
        return None
    needs = "rollout.max_new_tokens and a prompt" if asked > limit else "data.max_length"
    remedy = f"must be at least {max(asked, run.data.max_length or 0)}, what {needs} may need"
    return Problem("strategy.hybrid_engine.max_out_tokens", remedy, str(limit))


def rollout_lacks_old_logprobs(rollout: RolloutConfig) -> str | None:
    """Why PPO's old log-probs cannot come from a rollout sampled like this; None where they can.

    PPO's are at the rollout's temperature, over all tokens. A rollout knows those at temperature 1, and those under the
    distribution that it drew from, which are the same thing only where the temperature alone shaped it. Neither helps
    where these are of weights that have changed since.
    """
    if rollout.max_staleness:
        return f"with rollout.max_staleness={rollout.max_staleness} the rollout's are those of older weights"
    if rollout.temperature == 1.0 and rollout.backend != "vllm":
        return None
    shapes = {
        "top_k": (rollout.top_k, 0),
        "top_p": (rollout.top_p, 1.0),
        "min_p": (rollout.min_p, 0.0),
        "repetition_penalty": (rollout.repetition_penalty, 1.0),
        "min_new_tokens": (rollout.min_new_tokens, 0),
    }
    given = [f"{name}={value}" for name, (value, off) in shapes.items() if value != off]
    if not given:
        return None
    return (
        f"with rollout.temperature={rollout.temperature} and {', '.join(given)} the rollout does not know the "
        "log-probs at that temperature over all tokens"
    )


def rollout_knows_old_logprobs(run: PPORun) -> Problem | None:
    """Old log-probs can come from the rollout only where it knows them."""
    if run.algorithm.old_logprobs != "rollout":
        return None
    reason = rollout_lacks_old_logprobs(run.rollout)
    if reason is None:
        return None
    return Problem("algorithm.old_logprobs", f"{reason}: use recompute or auto", "'rollout'")


def problem_with_staleness(algorithm: OnlineConfig, rollout: RolloutConfig) -> Problem | None:
    """Why an algorithm cannot learn from a rollout of older weights; None where it can, or there is none.

    What older weights drew is weighed by how probable it is now, as in the decoupled objective of Fu et al. 2025,
    "AReaL", arXiv:2505.24298, with truncated weights (Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training").
    """
    if not rollout.max_staleness:
        return None
    if algorithm.importance_cap is None:
        remedy = f"needed with rollout.max_staleness={rollout.max_staleness}, such as 2.0: it weighs older tokens"
        return Problem("algorithm.importance_cap", remedy, "None")
    groups = algorithm.groups if isinstance(algorithm, GroupConfig) else None
    if groups is None:
        return None
    remedy = "waits for a batch to choose from it, and rollout.max_staleness above 0 does not: leave one of them out"
    return Problem("algorithm.groups", remedy, str(groups))


def staleness_is_corrected(run: PPORun) -> Problem | None:
    """What older weights drew is weighed."""
    return problem_with_staleness(run.algorithm, run.rollout)
