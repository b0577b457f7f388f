"""A running average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_hybrid.callbacks.export import HFExport
from lightning_hybrid.checkpoint import exchange_weights
from lightning_hybrid.data.checking import notice
from lightning_hybrid.errors import ConfigError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

AVERAGE = "average"


class EMA(L.Callback):
    """Keep an exponential moving average of what one engine trains, and export it when training ends.

    After every optimizer step that is taken, ``average = decay * average + (1 - decay) * weights``, beginning with the
    weights as they were before the first one (Ouyang et al. 2022; DeepSpeed-Chat: 0.992). It is one more state of the
    engine's optimizer: four bytes for each weight that a rank steps (at ZeRO 1 to 3 its share, at 0 all of them) beside
    Adam's eight, in float32 also where the model computes in bf16, in which a step of 1 - decay would vanish. So it
    lies, sleeps and is checkpointed as Adam's moments are, and a run may go on with another number of ranks or at
    another ZeRO stage.

    Args:
        child: name of the module's child that is averaged, which an engine trains.
        decay: weight of the average so far, above 0 and below 1.
        export: writes the averaged child when training ends; None for nobody, see :meth:`averaged`.

    Raises:
        ConfigError: if ``decay`` is out of its range; in training, if no engine trains ``child``.
    """

    def __init__(self, child: str, decay: float = 0.992, export: HFExport | None = None) -> None:
        if not 0 < decay < 1:
            raise ConfigError(f"decay of EMA must be above 0 and below 1, found {decay}; 0.992 is a usual value")
        self.child = child
        self.decay = decay
        self.export = export
        self._hooks: list[Any] = []
        self._begun: dict[Tensor, Tensor] = {}
        self._resumed = False

    @property
    @override
    def state_key(self) -> str:
        return f"EMA of {self.child}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """The averages are the engine's; this says that they are this callback's."""
        return {"decay": self.decay}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The engine has loaded the averages."""
        self._resumed = True

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Ask whether the export will be possible."""
        if self.export is not None:
            self.export.setup(trainer, pl_module, stage)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the optimizer's steps."""
        optimizer = self._engine(trainer).basic_optimizer
        if not self._resumed:
            self._begin_anew(optimizer, resumed=trainer.ckpt_path is not None)
        self._hooks = [
            optimizer.register_step_pre_hook(self._remember_beginnings),
            optimizer.register_step_post_hook(self._take_in),
        ]

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the averaged weights."""
        if self.export is not None:
            with self.averaged(trainer):
                average = f"The weights are the exponential moving average of the trained ones, decay {self.decay:g}."
                self.export.write(trainer, pl_module, average)

    @contextmanager
    def averaged(self, trainer: L.Trainer) -> Iterator[None]:
        """The child has the averaged weights inside the block, its own again after it; all ranks, during training."""
        engine, residency = self._engine(trainer), trainer.strategy.residency  # type: ignore[attr-defined]
        residency.enter("train", [self.child])
        exchange_weights(engine, AVERAGE)
        try:
            yield
        finally:
            exchange_weights(engine, AVERAGE)
            residency.enter(None)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop following."""
        self._stop()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop following; Lightning does not tear callbacks down after an exception."""
        self._stop()

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._begun, self._resumed = [], {}, False

    def _engine(self, trainer: L.Trainer) -> DeepSpeedEngine:
        engines = getattr(trainer.strategy, "engines", {})
        if self.child not in engines:
            trained = ", ".join(repr(name) for name in engines) or f"no engines ({type(trainer.strategy).__name__})"
            raise ConfigError(
                f"EMA averages what an engine trains, and none trains {self.child!r}; there are: {trained}. Use "
                "strategy='hybrid_deepspeed' and name the child that has the optimizer"
            )
        engine: DeepSpeedEngine = engines[self.child]
        return engine

    def _begin_anew(self, optimizer: Optimizer, *, resumed: bool) -> None:
        """Drop averages that another run kept up to some step, and nobody kept up since."""
        for state in optimizer.state.values():
            state.pop(AVERAGE, None)
        if resumed:
            notice(f"the checkpoint holds no average of {self.child!r}: it begins with the weights of the checkpoint")

    # ---- steps of the torch optimizer inside the engine, to which ZeRO gives a group, or a part of one, at a time ----

    def _remember_beginnings(self, optimizer: Optimizer, *_: Any) -> None:
        for weights in _stepped(optimizer):
            # Without a gradient they are not stepped, and an entry of ours would make Adam take its own for begun.
            if weights.grad is not None and AVERAGE not in optimizer.state.get(weights, {}):
                self._begun[weights] = weights.detach().to(torch.promote_types(weights.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def _take_in(self, optimizer: Optimizer, *_: Any) -> None:
        for weights in _stepped(optimizer):
            if weights in self._begun:
                optimizer.state[weights][AVERAGE] = self._begun.pop(weights)
            average = optimizer.state.get(weights, {}).get(AVERAGE)
            if average is not None:
                average.lerp_(weights.detach().to(average.dtype), 1 - self.decay)


def _stepped(optimizer: Optimizer) -> Iterator[Tensor]:
    """What this very step is about."""
    for group in optimizer.param_groups:
        yield from group["params"]
