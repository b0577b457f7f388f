"""Which metrics of a run are worth a curve, and what they are called."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

SECONDS = "seconds/"
"""What the metrics begin with that hold the seconds of a phase."""
PHASES = ("rollout", "reward", "experience", "update")
"""The phases of an iteration, in the order in which they run."""


@dataclass(frozen=True)
class Panel:
    """One plot: what it is called, its unit, the metrics it shows, and which of their ends is better, if one is."""

    title: str
    unit: str
    train: str
    validation: str | None = None
    better: Literal["higher", "lower"] | None = None

    def shows(self, metrics: Collection[str]) -> list[str]:
        """Those of the metrics that the panel shows."""
        if self.train == SECONDS:
            return [f"{SECONDS}{name}" for name in phases_of(metrics)]
        return [name for name in (self.train, self.validation) if name is not None and name in metrics]


_PREFERENCE = (
    Panel("lead of the chosen", "implicit reward", "rewards/margin", "val/rewards/margin", "higher"),
    Panel("implicit reward, chosen", "β × nats", "rewards/chosen", "val/rewards/chosen"),
    Panel("implicit reward, rejected", "β × nats", "rewards/rejected", "val/rewards/rejected"),
)

STAGES: dict[str, tuple[str, str, tuple[Panel, ...]]] = {
    "sft": ("SFT", "optimizer step", (Panel("loss", "nats per token", "loss", "val/loss", "lower"),)),
    "reward": (
        "Reward model",
        "optimizer step",
        (
            Panel("loss", "nats per pair", "loss", "val/loss", "lower"),
            Panel("accuracy", "share of pairs", "accuracy", "val/accuracy", "higher"),
        ),
    ),
    "dpo": (
        "DPO",
        "optimizer step",
        (
            Panel("loss", "mean over pairs", "loss", "val/loss", "lower"),
            Panel("accuracy", "share of pairs", "rewards/accuracy", "val/rewards/accuracy", "higher"),
            *_PREFERENCE,
        ),
    ),
    "kto": (
        "KTO",
        "optimizer step",
        (
            Panel("loss", "mean over responses", "loss", "val/loss", "lower"),
            Panel("accuracy", "share of responses", "rewards/accuracy", "val/rewards/accuracy", "higher"),
            *_PREFERENCE,
            Panel("baseline", "KL, nats", "kl", "val/kl"),
        ),
    ),
    "ppo": (
        "PPO",
        "iteration",
        (
            Panel("reward", "mean score", "reward/score", "val/score", "higher"),
            Panel("KL to the reference", "nats per response", "policy/kl", "val/kl"),
            Panel("win rate against the reference", "share of held-out prompts", "val/win_rate", None, "higher"),
            Panel("entropy of the policy", "nats per token", "policy/entropy"),
            Panel("clipped ratios", "share of tokens", "policy/clip_fraction"),
            Panel("explained variance of the values", "1 is perfect", "value/explained_variance"),
            Panel("response length", "tokens", "rollout/response_length", "val/response_length"),
            Panel("responses that end with EOS", "share of responses", "rollout/eos_rate", "val/eos_rate"),
            Panel("seconds per phase", "seconds", SECONDS),
        ),
    ),
}
"""For each recipe its name, what its steps count, and its panels."""


def panels_for(recipe: str, metrics: Collection[str]) -> list[Panel]:
    """The panels of a recipe, or of all recipes if it is none of them, for which something was logged.

    Args:
        recipe: such as ``"ppo"``.
        metrics: names of what was logged.
    """
    known = STAGES[recipe][2] if recipe in STAGES else tuple(p for _, _, panels in STAGES.values() for p in panels)
    by_metric: dict[str, Panel] = {}
    for panel in known:
        by_metric.setdefault(panel.train, panel)
    return [panel for panel in by_metric.values() if panel.shows(metrics)]


def phases_of(metrics: Collection[str]) -> list[str]:
    """Names of the phases whose seconds were logged, in the order in which they run."""
    logged = [name.removeprefix(SECONDS) for name in metrics if name.startswith(SECONDS)]
    known = [name for name in PHASES if name in logged]
    return known + [name for name in logged if name not in known]
