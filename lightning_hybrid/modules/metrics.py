"""What a PPO iteration logs; every figure is the same on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.modules.experience import Experience
from lightning_hybrid.modules.old_logprobs import LogprobGap
from lightning_hybrid.rl import estimate_kl
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


def rollout_metrics(module: PPOModule, rollout: Rollout, experience: Experience) -> dict[str, float]:
    """Figures of the responses: reward, KL to the reference (nats), lengths."""
    mask = experience.mask
    kl = estimate_kl(experience.old_logprobs, experience.ref_logprobs, module.config.kl_estimator)
    returns, values = experience.returns[mask].double(), experience.values[mask].double()
    raw = module.raw_scores.double()
    sums = module._sum_over_ranks(
        torch.stack(
            [
                torch.tensor(float(len(experience)), dtype=torch.float64, device=mask.device),
                mask.sum().double(),
                raw.sum(),
                raw.square().sum(),
                experience.scores.double().sum(),
                kl.masked_fill(~mask, 0.0).double().sum(),
                rollout.finished.double().sum(),
                *_spread(returns - values),
                *_spread(returns),
            ]
        )
    )
    rows, tokens, score, square, scaled, kl_sum, ended, e1, e2, r1, r2 = sums.tolist()
    return {
        "reward/score": score / rows,
        "reward/score_std": max(square / rows - (score / rows) ** 2, 0.0) ** 0.5,
        "reward/entered": scaled / rows,
        "policy/kl": kl_sum / rows,
        "policy/kl_per_token": kl_sum / tokens,
        "policy/kl_coef": module.kl_controller.value,
        "rollout/response_length": tokens / rows,
        "rollout/eos_rate": ended / rows,
        "value/explained_variance": _explained(e1, e2, r1, r2, tokens),
    }


def mismatch_metrics(module: PPOModule, gap: LogprobGap, experience: Experience) -> dict[str, float]:
    """Figures of the rollout against training: the gap, where old log-probs came from, the importance weights."""
    metrics = gap.metrics() | {"rollout/old_logprobs_recomputed": float(module.old_logprob_source.recompute)}
    weights, mask, cap = experience.weights, experience.mask, module.config.importance_cap
    if weights is None or cap is None:
        return metrics
    capped = (weights >= weights.new_tensor(cap)) & mask
    sums = torch.stack([weights.double().sum(), capped.sum().double(), mask.sum().double()])
    total, at_cap, tokens = module._sum_over_ranks(sums).tolist()
    return metrics | {"rollout/importance_weight_mean": total / tokens, "rollout/importance_capped": at_cap / tokens}


def update_metrics(module: PPOModule, update: dict[str, float], rollout: Rollout) -> dict[str, float]:
    """Figures of the optimization steps, the seconds of each phase and tokens per second, over all ranks."""
    seconds = dict(module.phases.seconds)
    tokens = float(module._sum_over_ranks(rollout.response_mask.sum().float()))
    policy = ("policy_loss", "entropy", "clip_fraction", "ratio_mean", "ratio_max", "approx_kl", "stopped_early")
    metrics = {f"policy/{name.removeprefix('policy_')}": update[name] for name in policy}
    metrics |= {"value/loss": update["value_loss"], "value/clip_fraction": update["value_clip_fraction"]}
    metrics |= {f"seconds/{name}": value for name, value in seconds.items()}
    metrics |= {
        "throughput/rollout_tokens_per_second": tokens / seconds["rollout"],
        "throughput/update_tokens_per_second": tokens * update["epochs"] / seconds["update"],
        "optimizer_steps": float(module.optimizer_steps),
        "nonfinite_steps": update["nonfinite_steps"],
        "lr": module.trainer.optimizers[0].param_groups[0]["lr"],
    }
    engine = module._engine("actor").timings.metrics()
    return metrics | {f"engine/{name}": value for name, value in engine.items()}


def _spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and sum of squares."""
    return x.sum(), x.square().sum()


def _explained(error: float, error_square: float, total: float, total_square: float, count: float) -> float:
    """1 - Var(error) / Var(returns); 0 where the returns do not vary."""
    variance = total_square / count - (total / count) ** 2
    left = error_square / count - (error / count) ** 2
    return 1.0 - left / variance if variance > 1e-12 else 0.0
