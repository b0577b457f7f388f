"""Backward passes that may run through several engines at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import Tensor

from lightning_hybrid.errors import StrategyError

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


# By engine, 1 while every loss since its last step was finite, NaN otherwise; read only where a step was skipped.
_losses: WeakKeyDictionary[DeepSpeedEngine, Tensor] = WeakKeyDictionary()


def backward(loss: Tensor, engines: Sequence[DeepSpeedEngine], **kwargs: Any) -> None:
    """Backpropagate ``loss`` and let every engine whose parameters it reaches reduce its gradients.

    ``engine.backward`` knows one engine. A loss may reach several (a generator's runs through the discriminator), and
    nobody says which: that is asked of autograd itself at the start of the pass. Gradients add up until the engine
    steps; nothing is divided by an accumulation count.

    A loss that is NaN or inf makes its gradients NaN, also where they would be finite. So the reduction of gradients,
    which is due anyway, tells every rank that one of them must not step.

    Args:
        loss: a scalar.
        engines: all engines of the run.
        **kwargs: for ``Tensor.backward`` (``gradient``, ``retain_graph``, ``create_graph``, ``inputs``).

    Raises:
        StrategyError: if an fp16 loss reaches two engines: each has its own loss scale.
    """
    reached: list[DeepSpeedEngine] = []
    verdict = loss.detach() * 0 + 1  # 0 times NaN or inf is NaN
    if loss.numel() == 1 and not any(engine.fp16_enabled() for engine in engines):
        kwargs.setdefault("gradient", verdict)
    begin = loss.register_hook(lambda _: reached.extend(_begin_backward(engines)))
    for engine in engines:
        _forget_last_backward(engine)
    try:
        with ExitStack() as stack:
            for engine in engines:
                stack.enter_context(_running_backward(engine))
            _scaled(loss, engines).backward(**kwargs)
            for engine in reached:
                engine._backward_epilogue()
    finally:
        begin.remove()
    for engine in reached:
        # Unmanaged accumulation counts its micro-batches itself, for DeepSpeed's own sample counter.
        engine._unmanaged_backward_count += 1
        _losses[engine] = _losses[engine] * verdict if engine in _losses else verdict


def losses_were_finite(engine: DeepSpeedEngine) -> Callable[[], bool]:
    """Whether all losses that reached ``engine`` since its last step were finite on this rank; asked when called."""
    verdict = _losses.get(engine)
    return lambda: verdict is None or bool(verdict.isfinite().all())


def forget_losses(engine: DeepSpeedEngine) -> None:
    """Begin anew: the engine has stepped, or dropped its gradients."""
    _losses.pop(engine, None)


def _begin_backward(engines: Sequence[DeepSpeedEngine]) -> list[DeepSpeedEngine]:
    """Start the backward pass of every engine that the running graph reaches; called from inside the pass."""
    from deepspeed.runtime.utils import count_used_parameters_in_backward

    reached = [e for e in engines if count_used_parameters_in_backward(_trainable(e)) > 0]
    for engine in reached:
        engine._backward_prologue()
    return reached


def _trainable(engine: DeepSpeedEngine) -> list[Any]:
    return [p for p in engine.module.parameters() if p.requires_grad]


def _scaled(loss: Tensor, engines: Sequence[DeepSpeedEngine]) -> Tensor:
    """Multiply an fp16 run's loss by its engine's loss scale."""
    scaling = [engine for engine in engines if engine.fp16_enabled() and _trainable(engine)]
    if not scaling:
        return loss
    if len(scaling) > 1:
        raise StrategyError(
            f"{len(scaling)} fp16 engines may receive this loss and each has its own loss scale: "
            "wrap the step in toggle_optimizer/untoggle_optimizer, or use precision='bf16-mixed'"
        )
    scaled: Tensor = scaling[0].scale(loss)
    return scaled


def _forget_last_backward(engine: DeepSpeedEngine) -> None:
    """What ``engine.forward`` does before a forward pass; modules here are called directly."""
    clear = getattr(engine.optimizer, "clear_backward_seen_flag", None)
    if clear is not None:
        clear()


@contextmanager
def _running_backward(engine: DeepSpeedEngine) -> Iterator[None]:
    """Tell the engine that the gradients arriving now are of a pass somebody else drives."""
    engine._running_engine_backward_count += 1
    engine._running_engine_backward = True
    try:
        yield
    finally:
        engine._running_engine_backward_count -= 1
        engine._running_engine_backward = engine._running_engine_backward_count > 0


def discard_gradients(engine: DeepSpeedEngine) -> None:
    """Drop the gradients accumulated since the last step.

    ZeRO-2 keeps reduced gradients beside the parameters, where its own ``zero_grad`` does not look.
    """
    forget_losses(engine)
    engine._unmanaged_backward_count = 0
    engine.optimizer.zero_grad()
    for name in ("averaged_gradients", "all_grad_tensors"):
        held = getattr(engine.optimizer, name, None)
        if held:
            for group in held:
                held[group] = None
    if getattr(engine.optimizer, "cpu_offload", False):
        # Offloaded gradients are added up from the second micro-batch on; make the next one the first.
        engine.optimizer.micro_step_id = -1
        engine.optimizer._offload_accumulated_param_ids.clear()
    if getattr(engine.optimizer, "offload_optimizer", False):
        engine.optimizer._offload_boundary_param_ids.clear()
    for parameter in engine.module.parameters():
        parameter.grad = None
