"""One vLLM engine inside this process: awake only while it generates, with the weights that were pushed last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

from lightning_hybrid.errors import RolloutError
from lightning_hybrid.rollout.vllm.weights import WeightStream

State = Literal["asleep", "holds weights", "awake"]


class SleepingEngine:
    """Keeps the order in which an engine wakes, is given weights, generates and goes back to sleep.

    The order is: memory of the weights, weights (where they have changed), what was cached with the old ones forgotten,
    memory of the KV cache, generation, sleep. It is asleep whenever :meth:`awake` is left, also by an exception.

    Args:
        llm: a ``vllm.LLM``, awake as it is built.
        sleeps: whether its platform can give memory back; where it cannot, the order is kept all the same.
        level: 2: it forgets its weights asleep; 1: it keeps them in host memory.

    Attributes:
        pushes: how often weights were pushed.
        seconds: of the last time that each step took, by name.
    """

    def __init__(self, llm: Any, *, sleeps: bool, level: int) -> None:
        self.llm = llm
        self.pushes = 0
        self.seconds: dict[str, float] = {}
        self._sleeps, self._level = sleeps, level
        self._state: State = "awake"
        self._version: object = None
        self._sleep()

    @contextmanager
    def awake(self, version: object, weights: Callable[[], WeightStream]) -> Iterator[None]:
        """Be awake inside the block, with these weights.

        Args:
            version: of the weights; they are pushed where it is another one than the last time, or None.
            weights: gives them.
        """
        try:
            self._wake("weights")
            if version is None or version != self._version:
                self._push(weights())
                self._version = version
            self._wake("kv_cache")
            yield
        finally:
            self._sleep()

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
            if self._sleeps:
                self.llm.wake_up(tags=[what])
        self._state = "holds weights" if what == "weights" else "awake"

    def _push(self, stream: WeightStream) -> None:
        self._version = None
        with self._timed("push"):
            try:
                # In one call: vLLM takes what a call does not name for what it is to keep as it was at the beginning.
                self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(stream)})
            finally:
                stream.drain()
            self.llm.collective_rpc(refresh_tied_head)
            self.llm.reset_prefix_cache()
        self.pushes += 1

    def _sleep(self) -> None:
        self._state = "asleep"
        with self._timed("sleep"):
            if self._sleeps:
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


def refresh_tied_head(worker: Any) -> None:
    """Let a head that is the embedding take its new weights.

    vLLM reloads layer by layer, and passes over such a head, which has no weights of its own. On a CPU, where kernels
    hold weights in a packed form, it would go on with the old ones.

    Args:
        worker: of vLLM, inside which this runs.
    """
    model = worker.model_runner.get_model()
    head = getattr(model, "lm_head", None)
    weight, method = getattr(head, "weight", None), cast(Any, getattr(head, "quant_method", None))
    if weight is None or not hasattr(method, "process_weights_after_loading"):
        return
    tied = any(module is not head and getattr(module, "weight", None) is weight for module in model.modules())
    if tied:
        method.process_weights_after_loading(head)
