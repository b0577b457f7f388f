"""One vLLM engine inside this process: awake only while it generates, with the weights that were pushed last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.rollout.vllm.weights import WeightStream, refuse_missing, refuse_others

State = Literal["asleep", "holds weights", "awake"]
Agreed = Callable[[Callable[[], Any], str], Any]
"""runs a step, named for the error, and raises on every rank where it failed on one"""


def alone(step: Callable[[], Any], _: str) -> Any:
    """Run a step without asking other ranks."""
    return step()


class SleepingEngine:
    """Keeps the order in which an engine wakes, is given weights, generates and goes back to sleep.

    The order is: memory of the weights, weights (where they have changed), what was cached with the old ones forgotten,
    memory of the KV cache, generation, sleep. It is asleep whenever :meth:`awake` is left, also by an exception.

    Args:
        llm: a ``vllm.LLM``, awake as it is built.
        sleeps: whether its platform can give memory back; where it cannot, the order is kept all the same.
        level: 2: it forgets its weights asleep; 1: it keeps them in host memory.
        shapes: of the weights that it was built for, by name; None to take any.

    Attributes:
        pushes: how often weights were pushed.
        seconds: that each step of the last round took, by name.
    """

    def __init__(self, llm: Any, *, sleeps: bool, level: int, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self.llm = llm
        self.pushes = 0
        self.seconds: dict[str, float] = {}
        self.sleeps, self._level, self._shapes = sleeps, level, shapes
        self._state: State = "awake"
        self._version: object = None
        self._sleep()

    @contextmanager
    def awake(self, version: object, weights: WeightStream | None, agreed: Agreed = alone) -> Iterator[None]:
        """Be awake inside the block, with these weights.

        Args:
            version: of the weights, to be known by; None for weights that nothing is known of.
            weights: to be pushed; None where :meth:`has` said that it has them.
            agreed: runs each step, so that no rank goes on where another one failed.

        Raises:
            RolloutError: for weights of another architecture, before it wakes.
        """
        if weights is not None and self._shapes is not None:
            refuse_others(weights.shapes, self._shapes)
        self.seconds = {}
        try:
            agreed(lambda: self._wake("weights"), "waking for weights")
            if weights is not None:
                agreed(lambda: self._push(weights), "taking the weights")
                self._version = version
            agreed(lambda: self._wake("kv_cache"), "waking to generate")
            yield
        finally:
            self._sleep()

    def has(self, version: object) -> bool:
        """Whether it still has the weights of this version, so that they need not be pushed."""
        return version is not None and version == self._version

    @property
    def figures(self) -> dict[str, float]:
        """Seconds of the last round: of pushing weights, of waking, of generating, of falling asleep."""
        taken = self.seconds
        return {
            "sync_seconds": taken.get("push", 0.0),
            "wake_seconds": taken.get("wake_weights", 0.0) + taken.get("wake_kv_cache", 0.0),
            "generate_seconds": taken.get("generate", 0.0),
            "sleep_seconds": taken.get("sleep", 0.0),
        }

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Any]) -> list[Any]:
        """vLLM's output for each prompt of token ids, drawn as its own ``vllm.SamplingParams`` say.

        Raises:
            RolloutError: where it is not awake.
        """
        if self._state != "awake":
            raise RolloutError(f"vLLM was asked to generate while it is {self._state}: only inside awake(...)")
        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        with self._timed("generate"):
            outputs: list[Any] = self.llm.generate(requests, list(sampling), use_tqdm=False)
        return outputs

    def _wake(self, what: Literal["weights", "kv_cache"]) -> None:
        with self._timed(f"wake_{what}"):
            if self.sleeps:
                self.llm.wake_up(tags=[what])
        self._state = "holds weights" if what == "weights" else "awake"

    def _push(self, weights: WeightStream) -> None:
        self._version = None
        with self._timed("push"):
            try:
                # In one call: vLLM takes what a call does not name for what it is to keep as it was at the beginning.
                missing = self.llm.collective_rpc(take_weights, kwargs={"weights": iter(weights)})[0]
            finally:
                weights.drain()
            refuse_missing(missing)
            self.llm.reset_prefix_cache()
        self.pushes += 1

    def _sleep(self) -> None:
        self._state = "asleep"
        with self._timed("sleep"):
            if self.sleeps:
                self.llm.sleep(level=self._level)
                if self._level > 1:
                    self._version = None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - begin


def take_weights(worker: Any, weights: Iterator[Any]) -> set[str]:
    """Load weights inside vLLM; which of its own were not among them.

    Args:
        worker: of vLLM, inside which this runs.
        weights: pairs of name and tensor.
    """
    model = worker.model_runner.get_model()
    wanted, taken = {name for name, _ in model.named_parameters()}, set[str]()
    load = model.load_weights

    def noting(given: Iterator[Any]) -> Any:
        names = load(given)
        taken.update(wanted if names is None else names)  # some families do not say
        return names

    model.load_weights = noting
    try:
        worker.reload_weights(weights_iterator=weights)
    finally:
        del model.load_weights
    _refresh_tied_head(model)
    return wanted - taken


def _refresh_tied_head(model: Any) -> None:
    """Let a head that is the embedding take its new weights.

    vLLM reloads layer by layer, and passes over such a head, which has no weights of its own. On a CPU, where kernels
    hold weights in a packed form, it would go on with the old ones.
    """
    head = getattr(model, "lm_head", None)
    weight, method = getattr(head, "weight", None), cast(Any, getattr(head, "quant_method", None))
    if weight is None or not hasattr(method, "process_weights_after_loading"):
        return
    tied = any(module is not head and getattr(module, "weight", None) is weight for module in model.modules())
    if tied:
        method.process_weights_after_loading(head)
