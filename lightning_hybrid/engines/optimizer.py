"""What Lightning holds as the optimizer of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from lightning_hybrid.engines.gradients import discard_gradients

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class _ParameterGroup(MutableMapping[str, Any]):
    """An engine's parameter group that shows the model's own parameters.

    ZeRO replaces ``params`` by flat shards. Whoever walks an optimizer's parameters (``toggle_optimizer``, callbacks)
    means the model's; everything else (``lr`` and so on) is read from and written to the engine's group.
    """

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        self._group = group
        self._params = params

    def __getitem__(self, key: str) -> Any:
        return self._params if key == "params" else self._group[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._group[key] = value

    def __delitem__(self, key: str) -> None:
        del self._group[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._group)

    def __len__(self) -> int:
        return len(self._group)


class EngineOptimizer(Optimizer):
    """Stand in for the optimizer that an engine took over: ``step`` steps the engine.

    Args:
        engine: the engine.
        params: the model's parameters of each group, in the groups' order, as they were before the engine took them.
    """

    def __init__(self, engine: DeepSpeedEngine, params: list[list[nn.Parameter]]) -> None:
        # Optimizer.__init__ would register the parameters a second time; this class owns none.
        self.engine = engine
        self._params = params

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        """The engine's groups with the model's own parameters in place of ZeRO's shards."""
        groups = self.engine.basic_optimizer.param_groups
        return [_ParameterGroup(group, params) for group, params in zip(groups, self._params, strict=True)]

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The state of the torch optimizer inside the engine, keyed by ZeRO's shards."""
        return self.engine.basic_optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the torch optimizer inside the engine."""
        defaults: dict[str, Any] = self.engine.basic_optimizer.defaults
        return defaults

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Apply the gradients accumulated since the last step."""
        if closure is not None:
            closure()
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient accumulated since the last step, wherever ZeRO keeps it."""
        discard_gradients(self.engine)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the engine saves its own state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to do: the engine loads its own state."""
