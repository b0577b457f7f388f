"""One call of the decode loop with everything in the test's hands, and stand-ins for what only a GPU has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.containers import Decode, Decoder, KVCache, Scores, bind
from lightning_hybrid.generation import Rollout, SamplingParams, StopTexts, Workspace
from lightning_hybrid.generation.graphs import ladder, rung
from lightning_hybrid.generation.loop import Generation
from lightning_hybrid.generation.step import Step
from lightning_hybrid.models import Policy

PROMPTS = [[5 + i % 7, *range(4, 4 + i % 5)] for i in range(13)]  # of 1 to 5 tokens
EOS_IDS = (3, 9, 14)
CAPACITY = 40


def decoder_of(policy: Policy) -> Decoder:
    return bind(policy.eval().model, CAPACITY)


def generation(
    policy: Policy,
    sampling: SamplingParams,
    *,
    slots: int = 6,
    stop: StopTexts | None = None,
    workspace: Workspace | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    any_rank: Callable[[bool], bool] = bool,
    lag: int | None = None,
) -> Generation:
    """Call it in inference mode."""
    decoder = decoder_of(policy)
    workspace = workspace or Workspace(decoder, slots, CAPACITY)
    return Generation(decoder, workspace, prompts, sampling, EOS_IDS, 0, None, stop, any_rank, lag)


@torch.inference_mode()
def generated(policy: Policy, sampling: SamplingParams, **options: Any) -> Rollout:
    return generation(policy, sampling, **options).run()


def assert_same(a: Rollout, b: Rollout) -> None:
    """To the last bit."""
    assert a.responses == b.responses
    assert a.finish_reasons == b.finish_reasons
    for name in ("policy_logprobs", "sampling_logprobs"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class PaddedSteps:
    """Runs each step as it is, for a size of the ladder instead of the live rows."""

    def __init__(self, step: Step) -> None:
        self.step, self.sizes = step, ladder(step.cache.slots)

    def __call__(self, rows: int, bounds: list[int]) -> None:
        size = rung(self.sizes, rows)
        self.step.advance(size, [*bounds, *[0] * (size - rows)])


class PretendedStudio:
    """A studio whose graphs are plain calls."""

    def __init__(self, device: torch.device) -> None:
        self.rehearsals, self.captures = 0, 0

    def rehearse(self, play: Callable[[], None]) -> None:
        self.rehearsals += 1
        play()

    def capture(self, play: Callable[[], None]) -> PretendedGraph:
        self.captures += 1
        return PretendedGraph(play)


class PretendedGraph:
    def __init__(self, play: Callable[[], None]) -> None:
        self.replay = play


def decode_of_any_length(cache: KVCache, scores: list[Scores], lengths: Tensor, known: list[int]) -> Decode:
    """Plain attention that, like the kernel, does not need to know lengths on the host."""
    return Decode(cache, scores, lengths, [cache.capacity - 1] * len(lengths))
