"""One number per token: the critic, and the reward model that reads it at the last token."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models.merging import merged_entries, reason_not_merged
from lightning_hybrid.models.policy import Policy, base_of, extra_arguments, run_trunk


class ScalarModel(nn.Module):
    """A decoder trunk with a scalar head, stored as a Hugging Face sequence classifier with one label.

    Args:
        model: ``AutoModelForSequenceClassification`` of a decoder family, ``num_labels=1``, head named ``score``; or
            peft's model around one.

    Raises:
        TypeError: if the model has no per-token ``score`` head (encoder families).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        head = getattr(base_of(model), "score", None)
        # peft trains a copy of the head where adapters are.
        if not isinstance(getattr(head, "original_module", head), nn.Linear):
            raise TypeError(
                f"{type(base_of(model)).__name__} has no per-token linear head named 'score'; "
                "use a decoder family such as Llama, Qwen, GPT-2 or OPT"
            )
        self.model = model
        self._extra = extra_arguments(model)

    @property
    def config(self) -> Any:
        """The Hugging Face config of the wrapped model."""
        return base_of(self.model).config

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Value of each prefix.

        Args:
            input_ids: ``[batch, time]`` long.
            attention_mask: ``[batch, time]`` bool, True for real tokens.

        Returns:
            ``[batch, time]`` float32; entry ``t`` has read the tokens up to and including ``t``.
        """
        hidden = run_trunk(self.model, input_ids, attention_mask, self._extra)
        values: Tensor = base_of(self.model).score(hidden).squeeze(-1).float()
        return values

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Score of each sequence: the value at its last real token, ``[batch]`` float32."""
        return last_value(self(input_ids, attention_mask), attention_mask)


def last_value(values: Tensor, mask: Tensor) -> Tensor:
    """Pick from ``values`` ``[batch, time]`` the entry at each row's last True of ``mask``; ``[batch]``."""
    time = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, time, -1).amax(-1).clamp_min(0)
    return values.gather(1, last[:, None]).squeeze(1)


@torch.no_grad()
def scalar_from_policy(policy: Policy) -> ScalarModel:
    """A critic with a copy of the policy's trunk, adapters merged into it, and a head of zeros.

    Raises:
        ConfigError: if there are adapters that cannot be merged.
    """
    from transformers import AutoModelForSequenceClassification

    reason = reason_not_merged(policy.model)
    if reason is not None:
        raise ConfigError(
            f"no critic can be made of the policy, whose adapters cannot be merged: {reason}; give model.critic, such "
            "as the path of the model that the policy started from"
        )
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.zeros_(model.score.weight)
    own = model.state_dict()
    given = {entry.name: entry for entry in merged_entries(policy.model) if entry.name in own}
    for name, entry in given.items():
        own[name].copy_(entry.value(Tensor.detach))
    missing = sorted(own.keys() - given.keys() - {"score.weight"})
    if missing:
        raise ConfigError(f"{type(base_of(policy.model)).__name__} has no {missing[0]!r} for a critic's trunk")
    return ScalarModel(model)
