"""PTX: next-token loss on texts of one's own, so that reinforcement learning does not cost the policy its language."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.modules.likelihood import next_token_loss

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_hybrid.modules.ppo import PPOModule


class PTX:
    """Draw a batch of texts for each optimizer step (Ouyang et al. 2022, equation 2).

    Which texts a step draws follows from the seed, the iteration and the step inside it alone, so that a run that goes
    on from a checkpoint draws what it would have drawn, and any number of ranks draws the same texts together.

    Args:
        data: the texts; its ``batch_size`` are drawn on each rank.
        seed: of the order.
    """

    def __init__(self, data: InstructionDataModule, seed: int) -> None:
        self.data = data
        self.seed = seed
        self._loader: Any = None

    def setup(self, tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> None:
        """Read and tokenise the texts, as the policy reads them unless they say otherwise."""
        self.data.tokenizer = self.data.tokenizer or tokenizer
        self.data.max_length = self.data.max_length or max_positions
        self._loader = self.data.train_dataloader()

    def loss(self, module: PPOModule, step: int) -> Tensor:
        """Cross-entropy in nats per token over the texts of all ranks, 0-dim, for engines that average over ranks.

        Args:
            module: whose actor to train.
            step: number of the optimizer step in the run, were none left out.
        """
        batch = {name: tensor.to(module.device) for name, tensor in self._draw(module, step).items()}
        total, count = next_token_loss(module.actor, batch)
        return total / (module.sum_over_ranks(count.float()) / module.trainer.world_size).clamp_min(1)

    def _draw(self, module: PPOModule, step: int) -> dict[str, Tensor]:
        texts, ranks = self._loader.dataset, module.trainer.world_size
        begin = step * self.data.batch_size * ranks
        positions = [begin + i * ranks + module.global_rank for i in range(self.data.batch_size)]
        batch: dict[str, Tensor] = self._loader.collate_fn([texts[self._text(at, len(texts))] for at in positions])
        return batch

    def _text(self, position: int, texts: int) -> int:
        """Which text stands at a position of the endless order: all texts, shuffled anew each time around."""
        around, at = divmod(position, texts)
        return int(_order(texts, hash((self.seed, around)) % 2**63)[at])


@lru_cache(maxsize=2)  # a batch may end one time around and begin the next
def _order(texts: int, seed: int) -> Tensor:
    return torch.randperm(texts, generator=torch.Generator().manual_seed(seed))
