"""Reward modelling from preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lightning_hybrid.config import RewardConfig
from lightning_hybrid.data import PreferenceDataModule
from lightning_hybrid.models import ScalarModel, last_value, load_scalar, max_positions
from lightning_hybrid.modules.means import over_ranks, rows_that_count
from lightning_hybrid.modules.optimization import adamw_with_schedule
from lightning_hybrid.modules.sequences import stacked
from lightning_hybrid.rl import preference_loss


class RewardModule(L.LightningModule):
    """Bradley–Terry: the chosen text should score higher than the rejected one (Ouyang et al. 2022, equation 1).

    Args:
        model: a :class:`~lightning_hybrid.models.ScalarModel`, or the path or hub name of a causal LM or reward model.
        config: learning rate and schedule.
    """

    def __init__(self, model: ScalarModel | str | Path, config: RewardConfig | None = None) -> None:
        super().__init__()
        self.model = model if isinstance(model, ScalarModel) else load_scalar(model)
        self.model.train()  # from_pretrained leaves dropout off
        self.config = config or RewardConfig()

    @property
    def max_positions(self) -> int | None:
        """Tokens that a text may have; None for no limit."""
        return max_positions(self.model.config)

    def setup(self, stage: str) -> None:
        """Keep with the tokenizer how texts become token ids, so that those which the model scores later become so."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, PreferenceDataModule):
            data.keep_reward_texts()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Loss of one batch of pairs, see :class:`~lightning_hybrid.data.PreferenceDataModule`."""
        loss, chosen, rejected = self._compare(batch)
        self.log_dict(_agreement(loss, chosen, rejected), sync_dist=True, prog_bar=True)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log ``val/loss``, ``val/accuracy`` and ``val/margin``, of all pairs of all ranks."""
        _, chosen, rejected = self._compare(batch)
        count, margin = rows_that_count(self.trainer, batch_idx, len(chosen)), batch.get("margin")
        chosen, rejected = chosen[:count], rejected[:count]
        loss = preference_loss(chosen, rejected, None if margin is None else margin[:count])
        means, pairs = over_ranks(self.trainer, _agreement(loss, chosen, rejected), count)
        metrics = {f"val/{name}": value for name, value in means.items()}
        self.log_dict(metrics, batch_size=pairs, sync_dist=True, prog_bar=True)

    def _compare(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Score both sides of each pair; one forward pass for all, so that ZeRO-3 gathers once."""
        chosen, rejected = batch["chosen"], batch["rejected"]
        tokens = stacked(chosen["input_ids"], rejected["input_ids"])
        mask = stacked(chosen["attention_mask"], rejected["attention_mask"])
        values = self.model(tokens, mask)
        scores_chosen, scores_rejected = last_value(values, mask).chunk(2)
        loss = preference_loss(scores_chosen, scores_rejected, batch.get("margin"))
        return loss, scores_chosen.detach(), scores_rejected.detach()

    def configure_optimizers(self) -> Any:
        """AdamW with a schedule that steps with the optimizer."""
        return adamw_with_schedule(self.trainer, self.model.parameters(), self.config)


def _agreement(loss: Tensor, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """Loss, share of pairs in the right order (ties count half), and mean lead of the chosen."""
    lead = chosen - rejected
    return {"loss": loss.detach(), "accuracy": (lead.sign() / 2 + 0.5).mean(), "margin": lead.mean()}
