"""Calling what may never answer, with a limit on how long it is waited for."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from lightning_hybrid.errors import ConfigError

T = TypeVar("T")
LONGEST = 7 * 24 * 3600.0  # seconds; the system's own timers end at 24 days


class TookTooLong(Exception):
    """Time was up; becomes a `RewardError` that says what was waited for."""


def check_seconds(what: str, seconds: float) -> float:
    """Return a time limit in seconds.

    Raises:
        ConfigError: If it is not above 0, or more than a week.
    """
    if not 0 < seconds <= LONGEST:
        raise ConfigError(f"{what}: timeout_seconds is {seconds}: must be above 0 and at most {LONGEST:g} (a week)")
    return seconds


def within(seconds: float, function: Callable[[], T]) -> T:
    """Call a function in a thread of its own and wait for it.

    It finds the context variables and PyTorch's settings of the caller, so that it computes what it would have computed
    there. The caller stays free to be interrupted from the keyboard.

    Args:
        seconds: How long to wait; 0 or less gives no time at all.
        function: Takes nothing.

    Returns:
        What the function returned.

    Raises:
        TookTooLong: It has neither returned nor raised in time. Nothing in Python can end its thread: it runs on, keeps
            what it holds, and its result is dropped. It is a daemon, so the process can still end.
        BaseException: What the function raised.
    """
    future: Future[T] = Future()
    context, settings = contextvars.copy_context(), _torch_settings()

    def work() -> None:
        try:
            with settings():
                result = context.run(function)
        except BaseException as error:
            future.set_exception(error)  # raised by the caller, also when it is an exit
        else:
            future.set_result(result)

    if seconds > 0:
        threading.Thread(target=work, name="lightning-hybrid-reward", daemon=True).start()
        wait([future], timeout=seconds)
    if not future.done():
        raise TookTooLong
    return future.result()


class EventLoop:
    """An event loop in a daemon thread of its own, started with the first call; it lasts, and with it what users open
    in it, such as connections.
    """

    def __init__(self) -> None:
        self._running: asyncio.AbstractEventLoop | None = None

    def run(self, make: Callable[[], Coroutine[Any, Any, T]], seconds: float) -> T:
        """Run a coroutine and wait for it, with the context variables and PyTorch's settings of the caller.

        Args:
            make: Gives the coroutine, in the loop's thread.
            seconds: How long to wait.

        Returns:
            What the coroutine returned.

        Raises:
            TookTooLong: Time was up. The coroutine is cancelled; the next call has a new loop, as this one may hang.
            BaseException: What the coroutine raised; or an interrupt of the caller, which cancels it, too.
        """
        future: Future[T] = Future()
        settings = _torch_settings()

        async def work() -> None:
            try:
                with settings():
                    result = await make()
            except BaseException as error:  # an exit too: it is the caller's, and would end the loop here
                future.set_exception(error)
            else:
                future.set_result(result)

        task: Future[None] | None = None
        ended = False
        try:
            task = asyncio.run_coroutine_threadsafe(work(), self._loop())
            ended = bool(wait([future], timeout=seconds).done)
        finally:
            if not ended and task is not None:
                task.cancel()
            if not ended:
                self._running = None
        if not ended:
            raise TookTooLong
        return future.result()

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._running is None:
            self._running = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._running,), name="lightning-hybrid-loop", daemon=True).start()
            weakref.finalize(self, self._running.call_soon_threadsafe, self._running.stop)
        return self._running

    def __getstate__(self) -> dict[str, Any]:
        return {"_running": None}  # a copy starts its own


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run an event loop until it is told to stop, which its owner's end does, and give its descriptors back."""
    try:
        loop.run_forever()
    finally:
        loop.close()


def _torch_settings() -> Callable[[], AbstractContextManager[None]]:
    """What PyTorch keeps for each thread, as this thread has it, to be set in another one."""
    grad, inference, device = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_device()
    autocasts = [
        torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=torch.is_autocast_cache_enabled())
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    # A new thread would begin on the first GPU, whichever one this rank has. The stream knows its device.
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    @contextmanager
    def set_here() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode() if inference else torch.set_grad_enabled(grad))
            for autocast in autocasts:
                stack.enter_context(autocast)
            if device.type != "cpu":
                stack.enter_context(device)
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    return set_here
