"""A backend that generates beside training in scripted time, with a frozen copy of the policy's weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_hybrid.generation import Rollout, join
from lightning_hybrid.models import Policy
from lightning_hybrid.rollout import PipelinedBackend, PromptRequest

Pace = Callable[[PromptRequest], int]


class Response:
    """One response as far as it was drawn."""

    def __init__(self, request: PromptRequest, sample: int) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.versions: list[int] = []
        seed = hash((request.seed, request.index, sample)) % 2**63
        self.generator = torch.Generator().manual_seed(seed)


class ScriptedBackend(PipelinedBackend):
    """Draws token by token, in ticks: a request draws ``pace(request)`` tokens of each of its responses in one.

    A weight update comes ``training`` ticks after the one before it; a wait lasts as many ticks as it takes.

    Args:
        policy: as it starts; a copy of its model generates.
        longest: tokens of a response.
        ends: ids that end a response earlier.
        pace: tokens in a tick.
        training: ticks from one weight update to the next.
    """

    def __init__(
        self, policy: Policy, longest: int, ends: Collection[int], pace: Pace = lambda request: 100, training: int = 1
    ) -> None:
        self.model = copy.deepcopy(policy.model).eval()
        self.longest = longest
        self.ends = ends
        self.pace = pace
        self.training = training
        self.version = 0
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.submitted: list[PromptRequest] = []
        self.closed = 0
        self._open: dict[int, list[Response]] = {}
        self._finished: list[int] = []

    def submit(self, requests: Sequence[PromptRequest], n: int) -> None:
        assert not {request.key for request in self.submitted} & {request.key for request in requests}
        self.submitted += requests
        self._open |= {request.key: [Response(request, sample) for sample in range(n)] for request in requests}

    def update(self, engine: Any) -> int:
        for _ in range(self.training):
            self._tick()
        self.version += 1
        self.weights[self.version] = self._give(engine)
        return self.version

    def wait(self, keys: Collection[int], count: int) -> list[int]:
        assert set(keys) <= {*self._open}
        assert count <= len(keys)
        while len(done := [key for key in self._finished if key in keys]) < count:
            self._tick()
        return done

    def take(self, keys: Sequence[int], n: int) -> Rollout:
        taken = [self._open.pop(key) for key in keys]
        assert all(len(responses) == n for responses in taken)
        self._finished = [key for key in self._finished if key not in keys]
        return join([rollout_of(response, self.ends) for responses in taken for response in responses])

    def generate(
        self,
        engine: Any,
        prompts: Sequence[Sequence[int]],
        seed: int,
        greedy: bool = False,
        indices: Sequence[int] | None = None,
        n: int = 1,
    ) -> Rollout:
        mine = self.model.state_dict()
        own = {name: tensor.clone() for name, tensor in mine.items()}
        self._give(engine)
        places = range(len(prompts)) if indices is None else indices
        requests = [PromptRequest(-1, [*prompt], place, seed) for prompt, place in zip(prompts, places, strict=True)]
        responses = [Response(request, sample) for request in requests for sample in range(n)]
        for response in responses:
            self._draw(response, self.longest, greedy)
        self.model.load_state_dict(own)
        return replace(join([rollout_of(response, self.ends) for response in responses]), versions=None)

    def close(self) -> None:
        self.closed += 1

    @property
    def in_flight(self) -> int:
        """Requests whose responses nobody has taken."""
        return len(self._open)

    def _give(self, engine: Any) -> dict[str, Tensor]:
        source: Mapping[str, Tensor] = getattr(engine, "causal_lm", engine).state_dict()
        weights = {name: source[name].detach().clone() for name in self.model.state_dict()}
        self.model.load_state_dict(weights)
        return weights

    def _tick(self) -> None:
        for key, responses in self._open.items():
            for response in responses:
                self._draw(response, self.pace(response.request))
            if key not in self._finished and all(self._done(response) for response in responses):
                self._finished.append(key)

    def _done(self, response: Response) -> bool:
        return len(response.tokens) >= self.longest or bool({*response.tokens[-1:]} & {*self.ends})

    @torch.no_grad()
    def _draw(self, response: Response, tokens: int, greedy: bool = False) -> None:
        for _ in range(tokens):
            if self._done(response):
                return
            ids = torch.tensor([response.request.prompt + response.tokens])
            logprobs = self.model(ids).logits[0, -1].float().log_softmax(-1)
            sampled = logprobs.exp().multinomial(1, generator=response.generator)
            drawn = int(logprobs.argmax() if greedy else sampled)
            response.tokens.append(drawn)
            response.logprobs.append(float(logprobs[drawn]))
            response.versions.append(self.version)


def rollout_of(response: Response, ends: Collection[int]) -> Rollout:
    """A response as a rollout of one row."""
    before = len(response.request.prompt)
    tokens = torch.tensor([response.request.prompt + response.tokens])
    mask = torch.tensor([[False] * before + [True] * len(response.tokens)])
    logprobs = torch.tensor([[0.0] * before + response.logprobs])
    versions = torch.tensor([[0] * before + response.versions])
    reason = "eos" if response.tokens[-1] in ends else "length"
    return Rollout(tokens, ~mask, mask, logprobs, logprobs.clone(), (reason,), versions=versions)
