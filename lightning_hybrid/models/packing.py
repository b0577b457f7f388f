"""Rows that hold several texts: which models keep the texts apart."""

from __future__ import annotations

import torch

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.policy import Policy, extra_arguments, reads_positions_of_one_row, run_trunk

TOLERANCE = 1e-3  # relative to the hidden states; a text that sees another is off by far more


@torch.no_grad()
def refuse_unpackable(policy: Policy) -> None:
    """Run a few tokens packed and apart, and refuse a model to which that is not the same.

    Some models have no positions to tell texts apart by (ALiBi, recurrent ones), or do not use them for that. Rather
    than names of families, what the model itself computes decides.

    Raises:
        ConfigError: names the model and the fix.
    """
    name = policy.config.model_type
    if "position_ids" not in extra_arguments(policy.model):
        raise ConfigError(
            f"a {name} model takes no position_ids, so the texts of a packed row would see each other: "
            "set packing=false"
        )
    device = next(policy.parameters()).device
    if reads_positions_of_one_row(policy.config) and device.type == "cpu":
        return  # its kernels do not run here; they are given one row with all positions, as they ask for
    difference = _difference(policy, device)
    if not difference < TOLERANCE:  # NaN too
        raise ConfigError(
            f"the texts of a packed row would see each other in a {name} model: its hidden states change by "
            f"{difference:.1%} when two texts share a row; set packing=false"
        )


def _difference(policy: Policy, device: torch.device) -> float:
    """Largest change of a hidden state by packing, relative to the largest hidden state."""
    extra, modes = extra_arguments(policy.model), {module: module.training for module in policy.modules()}
    policy.eval()
    try:
        vocabulary = policy.config.get_text_config().vocab_size
        tokens = torch.arange(12, device=device).remainder(vocabulary).view(2, 6)
        apart = run_trunk(policy.model, tokens, torch.ones_like(tokens).bool(), extra)
        positions = torch.arange(6, device=device).repeat(2)[None]
        packed = run_trunk(policy.model, tokens.view(1, 12), torch.ones_like(positions).bool(), extra, positions)
    finally:
        for module, training in modes.items():
            module.training = training
    return float((packed.view_as(apart) - apart).abs().max() / apart.abs().max())
