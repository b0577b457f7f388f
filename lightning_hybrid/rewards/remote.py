"""A reward behind an HTTP endpoint: what goes wrong on the way is tried again, for a bounded time."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_hybrid.config.reward import LONGEST_PAUSE
from lightning_hybrid.errors import ConfigError, RewardError
from lightning_hybrid.rewards.answers import WANTED, parse_scores
from lightning_hybrid.rewards.base import Fields, Reward, taken
from lightning_hybrid.rewards.deadline import check_seconds
from lightning_hybrid.rewards.endpoint import Endpoint, TryFailed

LOGGER = logging.getLogger("lightning_hybrid")
FIRST_PAUSE = 1.0  # seconds; doubles with each try


class RemoteReward(Reward):
    """Posts ``{"prompts": [...], "responses": [...]}`` and expects ``{"scores": [one finite number per response]}``.

    Where columns are to be sent too, the request has them as ``"fields": {"answer": [...]}``.

    A connection that fails, an answer that is late, not what is expected, or of status 429 or 5xx is tried again after
    a pause of about 1, 2, 4, ... seconds, at most 60; or what the endpoint asks for in ``Retry-After``, at most 60 too.
    Other statuses are not tried again, and redirects not followed. One call takes at most ``(retries + 1) *
    timeout_seconds + retries * 60`` seconds; keep that below the strategy's ``timeout_seconds``, for which the other
    ranks wait.

    Args:
        url: Of the endpoint. A token needs ``https``, except on this machine.
        token_variable: Environment variable that holds a bearer token; ``None`` for none.
        timeout_seconds: For one try, from the look-up of the host's name to the last byte of the answer.
        retries: Further tries after the first.
        send_fields: Columns of the data that are sent too; their values must be what JSON can hold.

    Raises:
        ConfigError: The URL, the token or a number cannot be used.

    Example:
        >>> reward = RemoteReward("https://scores.example/v1", token_variable="SCORES_TOKEN", timeout_seconds=60)
    """

    def __init__(
        self,
        url: str,
        token_variable: str | None = None,
        timeout_seconds: float = 300.0,
        retries: int = 3,
        send_fields: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.endpoint = Endpoint(url, token_variable)
        self.timeout_seconds = check_seconds(f"reward endpoint {self.endpoint}", timeout_seconds)
        if retries < 0:
            raise ConfigError(f"reward endpoint {self.endpoint}: retries is {retries}: must be 0 or more")
        self.retries = retries
        self.name = str(self.endpoint)
        self.needed_fields = frozenset(send_fields)

    def identity(self) -> str:
        """The whole URL, query included, and what is sent."""
        return f"{type(self).__name__} {self.endpoint.url} {sorted(self.needed_fields)}"

    def prepare(self, prompts: list[str], responses: list[str], fields: Fields | None = None) -> Tensor:
        """The scores.

        Args:
            prompts: One text per sample.
            responses: One text per sample.
            fields: Columns of the data, each with one value per sample.

        Returns:
            Float32[B], on the CPU.

        Raises:
            RewardError: A column is missing, or holds what JSON cannot; or the endpoint gave no scores in any try: then
                it names the URL, how often and how long it was tried, what was wrong with the last try, and the
                beginning of the answer.
        """
        if len(prompts) != len(responses):
            raise RewardError(
                f"reward endpoint {self.endpoint} was given {len(prompts)} prompts and {len(responses)} responses: "
                "pass one of each per sample"
            )
        request = self._request(prompts, responses, fields)
        began, tries = time.monotonic(), 0
        while True:
            tries += 1
            try:
                return self._try(request, len(responses))
            except TryFailed as failure:
                if tries > self.retries or not failure.again:
                    raise RewardError(self._report(failure, tries, time.monotonic() - began)) from failure
                self._pause(failure, tries)

    def _request(self, prompts: list[str], responses: list[str], fields: Fields | None) -> bytes:
        sent: dict[str, object] = {"prompts": prompts, "responses": responses}
        if self.needed_fields:
            sent["fields"] = taken(self.name, self.needed_fields, fields, len(responses))
        try:
            return json.dumps(sent, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"reward endpoint {self.endpoint}: a value of the columns {sorted(self.needed_fields)} cannot be sent "
                f"as JSON ({error}): make it text or a finite number"
            ) from error

    def _try(self, request: bytes, count: int) -> Tensor:
        answer = self.endpoint.post(request, self.timeout_seconds)
        try:
            return torch.tensor(parse_scores(answer, count), dtype=torch.float32, device="cpu")
        except RewardError as error:  # a server in trouble answers all kinds of things
            raise TryFailed(str(error), f"it must answer {WANTED}", answer=answer) from error

    def _pause(self, failure: TryFailed, tries: int) -> None:
        # Some chance, so that ranks which failed together do not come back together; not from the global generator,
        # on which the run's repeatability rests.
        chance = random.SystemRandom().uniform(0.5, 1.0)
        growing = min(FIRST_PAUSE * 2 ** min(tries - 1, 30), LONGEST_PAUSE) * chance
        seconds = max(growing, min(failure.wait, LONGEST_PAUSE))
        LOGGER.warning(
            f"reward endpoint {self.endpoint}: try {tries} of {self.retries + 1} failed with {failure.problem}; "
            f"the next one is in {seconds:.1f} seconds"
        )
        time.sleep(seconds)

    def _report(self, failure: TryFailed, tries: int, seconds: float) -> str:
        answer = "" if failure.answer is None else f"; {self.endpoint.excerpt(failure.answer)}"
        return (
            f"reward endpoint {self.endpoint} gave no scores in {tries} {'try' if tries == 1 else 'tries'} over "
            f"{seconds:.1f} seconds; the last one: {failure.problem}{answer}: {failure.fix}"
        )
