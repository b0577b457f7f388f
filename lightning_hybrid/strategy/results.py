"""What a notebook gives to its ranks, and what comes back from rank 0."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies.launchers.multiprocessing import _GlobalStateSnapshot
from lightning.pytorch.trainer.states import TrainerFn, TrainerState
from torch import Tensor, nn
from typing_extensions import override

from lightning_hybrid.errors import ConfigError, StrategyError

if TYPE_CHECKING:
    from lightning_hybrid.strategy.hybrid import HybridDeepSpeedStrategy

LIGHTNING = "lightning.pytorch"


@dataclass(frozen=True)
class Surroundings:
    """What is set in the notebook's process, and holds in the ranks, too.

    Attributes:
        torch: states of the random number generators, and whether torch is deterministic.
        warnings: the filters.
        log_level: of Lightning.
    """

    torch: _GlobalStateSnapshot
    warnings: list[Any]
    log_level: int

    @classmethod
    def capture(cls) -> Surroundings:
        """Those of this process."""
        return cls(_GlobalStateSnapshot.capture(), list(warnings.filters), logging.getLogger(LIGHTNING).level)

    def restore(self) -> None:
        """Set them in this process."""
        self.torch.restore()
        warnings.filters[:] = self.warnings  # type: ignore[index]
        logging.getLogger(LIGHTNING).setLevel(self.log_level)


@dataclass(frozen=True)
class Job:
    """A function of the Trainer, what it is called with, and the states of the process that ranks begin with.

    Attributes:
        trainer: the function's.
        function: such as its ``_fit_impl``.
        args: of the function.
        kwargs: of the function.
        states: of the notebook's process.
    """

    trainer: L.Trainer
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    states: Surroundings

    FILE = "job.pt"

    def write(self, folder: Path) -> None:
        """Write it, classes and functions of ``__main__`` included.

        Raises:
            ConfigError: if cloudpickle is not installed.
            StrategyError: if something in it cannot be copied.
        """
        pickle = cloudpickle()
        try:
            torch.save(self, folder / self.FILE, pickle_module=pickle)
        except Exception as error:  # whatever the objects raise that are not meant to be copied
            raise StrategyError(
                "with devices > 1 every rank gets a copy of what the Trainer was given, and something in it cannot be "
                f"copied ({type(error).__name__}: {error}): make it where it is used first instead of in the notebook, "
                "or train with devices=1"
            ) from error

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read it, tensors on the host."""
        job = torch.load(folder / cls.FILE, map_location="cpu", weights_only=False)
        assert isinstance(job, cls)
        return job


@dataclass(frozen=True)
class Results:
    """What the Trainer and the module of the notebook get.

    Attributes:
        returned: by the function.
        state: of the Trainer.
        metrics: ``trainer.callback_metrics``.
        best_model_path: of the first checkpoint callback.
        progress: of the loop of a fit.
        weights: trained parameters and buffers, by name; none after an evaluation.
        kept: what the module writes into checkpoints.
    """

    returned: Any
    state: TrainerState
    metrics: dict[str, Tensor]
    best_model_path: str | None
    progress: dict[str, Any] | None
    weights: dict[str, Tensor]
    kept: dict[str, Any]

    FILE = "results.pt"

    @classmethod
    def of(cls, trainer: L.Trainer, returned: Any, weights: dict[str, Tensor]) -> Results:
        """Collect them on rank 0, after the function has returned."""
        fitted = trainer.state.fn == TrainerFn.FITTING
        kept: dict[str, Any] = {}
        if fitted:
            trainer.lightning_module.on_save_checkpoint(kept)
        return cls(
            returned=returned,
            state=trainer.state,
            metrics={name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
            best_model_path=getattr(trainer.checkpoint_callback, "best_model_path", None),
            progress=trainer.fit_loop.state_dict() if fitted else None,
            weights=weights,
            kept=kept,
        )

    def write(self, folder: Path) -> None:
        """Write them."""
        torch.save(self, folder / self.FILE, pickle_module=cloudpickle())

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read them."""
        results = torch.load(folder / cls.FILE, weights_only=False)
        assert isinstance(results, cls)
        return results

    def hand_over(self, trainer: L.Trainer) -> None:
        """Give the notebook's Trainer and module what their copies became."""
        trainer.state = self.state
        trainer.callback_metrics.update(self.metrics)
        if self.best_model_path is not None:
            trainer.checkpoint_callback.best_model_path = self.best_model_path  # type: ignore[union-attr]
        if self.progress is None:
            return
        trainer.fit_loop.load_state_dict(self.progress)
        trainer.fit_loop.restarting = False  # it has not stopped in the middle of anything
        module = trainer.lightning_module
        unknown = module.load_state_dict(self.weights, strict=False).unexpected_keys
        if unknown:
            raise StrategyError(f"training added {unknown} to the module, which the notebook's own copy does not have")
        if self.kept:
            module.on_load_checkpoint(self.kept)


class KeepWeights(L.Callback):
    """Gather the weights at the end of training, while there are engines; the last to do so sees what others changed.

    Attributes:
        weights: trained parameters and buffers, by name, on the host of rank 0; empty on other ranks.
    """

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather a parameter at a time; all ranks take part."""
        strategy: HybridDeepSpeedStrategy = trainer.strategy  # type: ignore[assignment]
        frozen = tuple(f"{name}." for name in strategy.frozen)
        tensors = {**dict(pl_module.named_parameters()), **dict(pl_module.named_buffers())}
        stored = pl_module.state_dict().keys()  # without buffers that are not persistent
        for name, tensor in tensors.items():
            if name not in stored or name.startswith(frozen):
                continue
            with _whole(tensor):
                if trainer.is_global_zero:
                    self.weights[name] = tensor.detach().to("cpu", copy=True)


def _whole(tensor: Tensor) -> Any:
    """A parameter out of its shards, for a block."""
    if not (isinstance(tensor, nn.Parameter) and hasattr(tensor, "ds_id")):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor])


def cloudpickle() -> Any:
    """The package that copies classes and functions of a notebook's cells.

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        import cloudpickle
    except ImportError as error:
        raise ConfigError(
            "devices > 1 in a notebook copies the cells' classes and functions to other processes, which needs "
            "cloudpickle: pip install 'lightning-hybrid[notebook]'"
        ) from error
    return cloudpickle


def as_bytes(value: Any) -> bytes:
    """An object as cloudpickle writes it."""
    buffer = io.BytesIO()
    cloudpickle().dump(value, buffer)
    return buffer.getvalue()
