"""What frozen models in processes of their own need of the rest of a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_hybrid.config.reward import terms_of
from lightning_hybrid.settings import Problem

if TYPE_CHECKING:
    from lightning_hybrid.config.ppo import PPORun


def separate_reference_is_in_a_folder(run: PPORun) -> Problem | None:
    """A process of its own has nothing but a folder to load a model from."""
    if not run.roles.reference.separate or run.model.reference is not None:
        return None
    remedy = None
    if not run.algorithm.reference:
        remedy = "needs algorithm.reference=true: there is none otherwise"
    elif run.model.adapter is not None:
        remedy = "the actor with its adapters off is the reference, which takes no memory: leave it out"
    elif run.model.path is None:
        remedy = "a process of its own reads it from a folder, and fresh weights are in none: give model.reference"
    return None if remedy is None else Problem("roles.reference.separate", remedy, "True")


def separate_reward_is_a_model(run: PPORun) -> Problem | None:
    """Other rewards compute where they are called."""
    if not run.roles.reward.separate or any(term.asks_a_model for term in terms_of(run.reward)):
        return None
    remedy = "is about reward models: give reward.path or reward.classifier; other sources run in the ranks"
    return Problem("roles.reward.separate", remedy, "True")


def separate_models_have_a_device(run: PPORun) -> Problem | None:
    """A model on the CPU would hold up ranks on GPUs."""
    if run.trainer.accelerator not in ("gpu", "cuda"):
        return None
    for name, role in (("reference", run.roles.reference), ("reward", run.roles.reward)):
        if role.separate and role.device is None:
            remedy = "is the CPU, beside ranks on GPUs: give its CUDA index; it may be one of theirs that has the room"
            return Problem(f"roles.{name}.device", remedy, "None")
    return None


def separate_models_are_reached(run: PPORun) -> Problem | None:
    """Processes of this machine listen on loopback only."""
    if run.trainer.num_nodes == 1 or run.launcher.name != "local":
        return None
    for name, role in (("reference", run.roles.reference), ("reward", run.roles.reward)):
        if role.separate:
            remedy = f"only the first of trainer.num_nodes={run.trainer.num_nodes} would reach it: use launcher=ray"
            return Problem(f"roles.{name}.separate", f"{remedy}, or leave it out", "True")
    return None
