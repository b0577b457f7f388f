"""What a PPO iteration logs; every figure is the same on all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.engines.agreement import of_all_ranks
from lightning_hybrid.modules.experience import Experience
from lightning_hybrid.modules.old_logprobs import LogprobGap
from lightning_hybrid.modules.sampling import Samples, informative
from lightning_hybrid.rl import estimate_kl
from lightning_hybrid.rollout import Rollout

if TYPE_CHECKING:
    from lightning_hybrid.modules.pipeline import Pipeline
    from lightning_hybrid.modules.ppo import PPOModule

# Names inside an update → names in the log.
UPDATE_FIGURES = {
    "policy_loss": "policy/loss",
    "kl_loss": "policy/kl_loss",
    "ptx_loss": "policy/ptx_loss",
    **{name: f"policy/{name}" for name in ("entropy", "clip_fraction", "ratio_mean", "ratio_max", "approx_kl")},
    "stopped_early": "policy/stopped_early",
    "value_loss": "value/loss",
    "value_clip_fraction": "value/clip_fraction",
}


def rollout_metrics(module: PPOModule, samples: Samples, experience: Experience) -> dict[str, float]:
    """Figures of the responses: reward, KL to the reference (nats), lengths, groups that tell nothing."""
    raw, mask = samples.raw_scores.double(), experience.mask
    tokens = mask.sum().double()
    sums = {
        "rows": torch.tensor(float(len(experience)), dtype=torch.float64, device=mask.device),
        "tokens": tokens,
        "score": raw.sum(),
        "score_square": raw.square().sum(),
        "entered": experience.scores.double().sum(),
        "ended": samples.rollout.finished.double().sum(),
        "drawn": tokens.new_tensor(samples.drawn),
        "alike": tokens.new_tensor(informative(module, samples).count(False)),
        "kl": _kl(module, experience),
        **{f"reward/{name}": values.double().sum().to(mask.device) for name, values in samples.figures.items()},
        **_value_sums(experience),
    }
    total = dict(zip(sums, module.sum_over_ranks(torch.stack(list(sums.values()))).tolist(), strict=True))
    rows, mean = total["rows"], total["score"] / total["rows"]
    metrics = {
        "reward/score": mean,
        "reward/score_std": max(total["score_square"] / rows - mean**2, 0.0) ** 0.5,
        "reward/entered": total["entered"] / rows,
        **{f"reward/{name}": total[f"reward/{name}"] / rows for name in samples.figures},
        "rollout/response_length": total["tokens"] / rows,
        "rollout/eos_rate": total["ended"] / rows,
    }
    if module.reference is not None:
        metrics |= {
            "policy/kl": total["kl"] / rows,
            "policy/kl_per_token": total["kl"] / total["tokens"],
            "policy/kl_coef": module.kl_controller.value,
        }
    if module.config.group_size > 1:
        metrics["rollout/uninformative_groups"] = total["alike"] * module.config.group_size / rows
        metrics["rollout/samples_drawn"] = total["drawn"]
    if module.critic is not None:
        metrics["value/explained_variance"] = _explained(total)
    return metrics


def mismatch_metrics(module: PPOModule, gap: LogprobGap, experience: Experience) -> dict[str, float]:
    """Figures of the rollout against training: the gap, where old log-probs came from, the importance weights."""
    metrics = gap.metrics() | {"rollout/old_logprobs_recomputed": float(module.old_logprob_source.recompute)}
    weights, mask, cap = experience.weights, experience.mask, module.config.importance_cap
    if weights is None or cap is None:
        return metrics
    capped = (weights >= weights.new_tensor(cap)) & mask
    sums = torch.stack([weights.double().sum(), capped.sum().double(), mask.sum().double()])
    total, at_cap, tokens = module.sum_over_ranks(sums).tolist()
    return metrics | {"rollout/importance_weight_mean": total / tokens, "rollout/importance_capped": at_cap / tokens}


def update_metrics(module: PPOModule, update: dict[str, float], rollout: Rollout) -> dict[str, float]:
    """Figures of the optimization steps, the seconds of each phase and tokens per second, over all ranks."""
    seconds = dict(module.phases.seconds)
    tokens = float(module.sum_over_ranks(rollout.response_mask.sum().float()))
    metrics = {logged: update[name] for name, logged in UPDATE_FIGURES.items() if name in update}
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


def backend_metrics(module: PPOModule) -> dict[str, float]:
    """The backend's own figures of the last rollout, the largest of all ranks."""
    of_ranks = of_all_ranks(dict(module.backend.figures))
    names = dict.fromkeys(name for figures in of_ranks for name in figures)
    return {f"rollout/{name}": max(figures[name] for figures in of_ranks if name in figures) for name in names}


def staleness_metrics(pipeline: Pipeline, rollout: Rollout) -> dict[str, float]:
    """How old the weights are that drew the response tokens, and what waiting for these cost, over all ranks.

    Ages are in versions; ``interrupted`` is the share of responses whose tokens are of more than one.
    """
    module, mask, drawn_by = pipeline.module, rollout.response_mask, rollout.versions
    assert drawn_by is not None
    ages = (pipeline.version - drawn_by).masked_fill(~mask, 0)
    newest = ages.masked_fill(~mask, pipeline.version).amin(1)
    mixed, carried = int((ages.amax(1) > newest).sum()), len(pipeline.carried_over)
    own = torch.tensor([int(mask.sum()), int(ages.sum()), len(ages), mixed, carried], dtype=torch.float64)
    tokens, age, rows, interrupted, carried_over = module.sum_over_ranks(own.to(mask.device)).tolist()
    worst = torch.tensor([float(ages.max()), pipeline.waited], device=mask.device, dtype=torch.float64)
    oldest, waited = module.trainer.strategy.reduce(worst, reduce_op="max").tolist()
    return {
        "rollout/staleness_mean": age / tokens,
        "rollout/staleness_max": oldest,
        "rollout/interrupted": interrupted / rows,
        "rollout/carried_over": carried_over,
        "rollout/wait_seconds": waited,
    }


def response_kl(module: PPOModule, experience: Experience) -> Tensor | None:
    """KL of each of this rank's responses to the reference, ``[batch]`` float64, nats; None without a reference."""
    if experience.ref_logprobs is None:
        return None
    kl = estimate_kl(experience.old_logprobs, experience.ref_logprobs, module.config.kl_estimator)
    return kl.masked_fill(~experience.mask, 0.0).double().sum(1)


def _kl(module: PPOModule, experience: Experience) -> Tensor:
    """Sum over this rank's tokens of the KL to the reference, 0-dim; 0 without one."""
    kl = response_kl(module, experience)
    return experience.mask.new_zeros((), dtype=torch.float64) if kl is None else kl.sum()


def _value_sums(experience: Experience) -> dict[str, Tensor]:
    """Sums and sums of squares of the critic's errors and of the returns."""
    if experience.values is None or experience.returns is None:
        return {}
    returns, values = experience.returns[experience.mask].double(), experience.values[experience.mask].double()
    error = returns - values
    return {
        "error": error.sum(),
        "error_square": error.square().sum(),
        "return": returns.sum(),
        "return_square": returns.square().sum(),
    }


def _explained(total: dict[str, float]) -> float:
    """1 - Var(error) / Var(returns); 0 where the returns do not vary."""
    count = total["tokens"]
    variance = total["return_square"] / count - (total["return"] / count) ** 2
    left = total["error_square"] / count - (total["error"] / count) ** 2
    return 1.0 - left / variance if variance > 1e-12 else 0.0
