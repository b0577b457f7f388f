"""From responses as they were drawn to one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_hybrid.generation.carrier import Rollout, pad_left
from lightning_hybrid.generation.sampling import SamplingParams
from lightning_hybrid.generation.slots import Results

if TYPE_CHECKING:
    from lightning_hybrid.generation.loop import Response


def assemble(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    results: Results,
    sampling: SamplingParams,
    pad_id: int = 0,
) -> Rollout:
    """One row per response, those of a prompt together, prompts padded on the left and responses on the right."""
    device = results.tokens.device
    prompt, prompt_mask = pad_left([prompts[response.prompt] for response in responses], pad_id, device)
    lengths = torch.tensor([r.length - len(prompts[r.prompt]) for r in responses], device=device)
    width = int(lengths.max())
    mask = torch.arange(width, device=device) < lengths[:, None]

    def beside(values: Tensor, fill: float) -> Tensor:
        drawn = values[: len(responses), :width].masked_fill(~mask, fill)
        before = torch.zeros_like(prompt, dtype=values.dtype)
        return torch.cat([before, drawn], 1)

    tokens = beside(results.tokens, pad_id)
    tokens[:, : prompt.shape[1]] = prompt
    return Rollout(
        tokens=tokens,
        prompt_mask=torch.cat([prompt_mask, torch.zeros_like(mask)], 1),
        response_mask=torch.cat([torch.zeros_like(prompt_mask), mask], 1),
        policy_logprobs=beside(results.policy, 0.0),
        sampling_logprobs=beside(results.sampling, 0.0),
        finish_reasons=tuple(response.reason for response in responses),
        entropies=None if results.entropies is None else beside(results.entropies, 0.0),
    )
