"""Next-token loss on the tokens that count."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_hybrid.models import Policy


def next_token_loss(policy: Policy, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-probs of the counted tokens (nats, 0-dim), and their number (long, 0-dim).

    Args:
        policy: whose log-probs.
        batch: of :class:`~lightning_hybrid.data.InstructionDataModule`, packed or not.
    """
    counts = batch["loss_mask"].clone()
    counts[:, 0] = False  # the first token has no past to be predicted from
    position_ids = batch.get("position_ids")
    if position_ids is None:
        output = policy(batch["input_ids"], batch["attention_mask"], counts)
    else:
        counts &= position_ids > 0  # nor has the first of any packed text
        output = policy(batch["input_ids"], batch["attention_mask"], counts, position_ids=position_ids)
    return -output.logprobs.sum(), counts.sum()
