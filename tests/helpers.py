"""Small real models, data and trainers that several tests use."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid.data.task import build_tokenizer
from lightning_hybrid.engines import gathered
from lightning_hybrid.models import Policy, build_policy

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# With the defaults a tiny model stays resident at ZeRO-3 and hides what sharding would break.
SHARD_EVERYTHING = {
    "zero_optimization": {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
}

# What every PPO iteration logs.
PPO_FIGURES = {
    "engine/generate_seconds",
    "engine/samples_per_second",
    "policy/clip_fraction",
    "policy/entropy",
    "policy/kl",
    "policy/ratio_max",
    "policy/ratio_mean",
    "reward/score",
    "rollout/eos_rate",
    "rollout/response_length",
    "seconds/experience",
    "seconds/reward",
    "seconds/rollout",
    "seconds/update",
    "throughput/rollout_tokens_per_second",
    "throughput/update_tokens_per_second",
    "value/explained_variance",
    "value/loss",
}


def tiny_policy(seed: int = 0, **changes: Any) -> Policy:
    torch.manual_seed(seed)
    return build_policy(TINY_LLAMA | changes, len(build_tokenizer()))


def quiet_trainer(strategy: Any, **arguments: Any) -> L.Trainer:
    """A Trainer on one CPU process that prints and writes nothing, and leaves the order of the data alone."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return L.Trainer(strategy=strategy, **(defaults | arguments))


def weights_of(module: nn.Module) -> Tensor:
    """All parameters in one vector, also from ZeRO-3 shards."""
    with gathered(module):
        return torch.cat([p.detach().float().flatten().clone() for p in module.parameters()])


def random_batches(rows: int = 24, width: int = 6, batch_size: int = 4, seed: int = 1) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(torch.randn(rows, width, generator=generator)), batch_size=batch_size)


class GAN(L.LightningModule):
    """A generator and a discriminator with one optimizer each, as in Lightning #19773."""

    def __init__(self, toggle: bool = True) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.toggle = toggle
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        noise, real = batch[0][:, :4], batch[0][:, 4:]
        generator, discriminator = self.optimizers()
        self._step(generator, lambda: self._loss(self.discriminator(self.generator(noise)), 1.0))
        self._step(
            discriminator,
            lambda: (
                self._loss(self.discriminator(real), 1.0)
                + self._loss(self.discriminator(self.generator(noise).detach()), 0.0)
            ),
        )

    def _step(self, optimizer: Any, compute: Any) -> None:
        if self.toggle:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(compute())
        optimizer.step()
        if self.toggle:
            self.untoggle_optimizer(optimizer)

    @staticmethod
    def _loss(logits: Tensor, target: float) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(network.parameters(), lr=1e-2) for network in networks]


class Regression(L.LightningModule):
    """One optimizer, automatic optimization, a schedule; logs its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
        self.seen: list[float] = []

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(
            self.network(batch[0][:, :5].to(self._precision())).float(), batch[0][:, 5:].float()
        )

    def _precision(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("loss", loss.detach())
        self.seen.append(float(self.optimizers().param_groups[0]["lr"]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self._loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.network(batch[0][:, :5].to(self._precision()))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
