"""Lightning's precision plugin, sent to the right engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.plugins.precision.deepspeed import DeepSpeedPrecision
from torch import Tensor, nn
from torch.optim import LBFGS
from typing_extensions import override

from lightning_hybrid.engines import backward, cast_parameters
from lightning_hybrid.errors import StrategyError

if TYPE_CHECKING:
    import lightning.pytorch as pl


class HybridPrecision(DeepSpeedPrecision):
    """Backward through every engine a loss reaches; step the engine an optimizer stands for."""

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast parameters with ``*-true`` precision; buffers stay as they are."""
        if "true" in self.precision:
            cast_parameters(module, self._desired_dtype)
        return module

    @override
    def backward(  # type: ignore[override]
        self, tensor: Tensor, model: pl.LightningModule, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Backpropagate ``tensor``, a scalar loss; ``optimizer`` is not needed, autograd knows where a loss goes."""
        strategy: Any = model.trainer.strategy
        backward(tensor, list(strategy.engines.values()), **kwargs)

    @override
    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: pl.LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Run the closure (forward and backward), then step the optimizer's engine, if all gradients are finite.

        Raises:
            NonFiniteError: if too many steps in a row were skipped.
            StrategyError: for L-BFGS, and for a ``training_step`` that returned None under automatic optimization.
        """
        if isinstance(getattr(optimizer.engine, "basic_optimizer", None), LBFGS):
            raise StrategyError("L-BFGS evaluates its closure several times per step, which DeepSpeed cannot do")
        result = closure()
        self._after_closure(model, optimizer)
        if model.automatic_optimization and result is None:
            raise StrategyError(
                "training_step returned None: every rank must take part in every step's gradient reduction; "
                "return a loss of zero, or use manual optimization"
            )
        strategy: Any = model.trainer.strategy
        name = next(name for name, engine in strategy.engines.items() if engine is optimizer.engine)
        strategy.guard.step(name, optimizer.engine, at=model.trainer.global_step, **kwargs)
        return result
