"""PTX: next-token loss on texts of one's own, so that reinforcement learning does not cost the policy its language."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_hybrid.data import InstructionDataModule
from lightning_hybrid.errors import ConfigError
from lightning_hybrid.models import max_positions
from lightning_hybrid.models.packing import refuse_unpackable
from lightning_hybrid.modules.likelihood import next_token_loss

if TYPE_CHECKING:
    from lightning_hybrid.modules.ppo import PPOModule


class PTX:
    """Draw a batch of texts for each optimizer step (Ouyang et al. 2022, equation 2).

    The texts come in the order of the data module, with its ``seed``, ``mix`` and ``balance``; after its last text it
    begins anew, in another order. Which texts a step draws follows from the number of the step alone, so that a run
    that goes on from a checkpoint draws what it would have drawn, and any number of ranks draws the same texts
    together.

    Args:
        data: the texts; its ``batch_size`` are drawn on each rank.

    Raises:
        ConfigError: if the data module has settings without effect here.
    """

    def __init__(self, data: InstructionDataModule) -> None:
        idle = {
            "validation_path": data.validation_path,
            "validation_fraction": data.validation_fraction,
            "num_workers": data.num_workers,
        }
        for name, value in idle.items():
            if value:
                raise ConfigError(f"{name}={value!r} has no effect on the texts of the PTX loss: leave it out")
        self.data = data
        self._loader: Any = None
        self._order: tuple[int, Sequence[int]] = (-1, [])

    def setup(self, module: PPOModule) -> None:
        """Read and tokenise the texts, as the policy reads them unless they say otherwise; all ranks call it.

        Raises:
            ConfigError: if texts are packed and the policy would let one see another.
            DataError: if the texts cannot be used, or the ranks have read different ones.
        """
        if self.data.packing:
            refuse_unpackable(module.actor)
        # Nothing is generated behind these texts: what bounds prompts, such as the KV cache, does not bound them.
        policy = SimpleNamespace(tokenizer=module.tokenizer, max_positions=max_positions(module.actor.config))
        ranks, rank = module.trainer.world_size, module.global_rank
        asked: Any = SimpleNamespace(world_size=ranks, global_rank=rank, current_epoch=0, lightning_module=policy)
        self.data.trainer = asked
        self.data.setup("fit")
        self._loader = self.data.train_dataloader()
        self._order = (-1, [])

    def loss(self, module: PPOModule, step: int) -> Tensor:
        """Cross-entropy in nats per token over the texts of all ranks, 0-dim, for engines that average over ranks.

        Args:
            module: whose actor to train.
            step: number of the optimizer step in the run, were none left out.
        """
        batch = {name: tensor.to(module.device) for name, tensor in self.draw(step).items()}
        total, count = next_token_loss(module.actor, batch)
        return total / (module.sum_over_ranks(count.float()) / module.trainer.world_size).clamp_min(1)

    def draw(self, step: int) -> dict[str, Tensor]:
        """This rank's texts of a step, see :class:`~lightning_hybrid.data.InstructionDataModule`."""
        sampler, size = self._loader.sampler, self.data.batch_size
        every = size * sampler.num_replicas
        steps = -(-sampler.count // every)  # of one time around; the last one is filled up with the first texts
        around, at = divmod(step, steps)
        if self._order[0] != around:
            self._order = around, sampler.order(around)
        order = self._order[1]
        places = range(at * every + sampler.rank, (at + 1) * every, sampler.num_replicas)
        rows = [self._loader.dataset[order[place % len(order)]] for place in places]
        batch: dict[str, Tensor] = self._loader.collate_fn(rows)
        return batch
