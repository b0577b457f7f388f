"""One request to an HTTP endpoint: sent with its token, answered in bounded time with bounded memory, or refused."""

from __future__ import annotations

import ipaddress
import os
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from lightning_hybrid.errors import ConfigError
from lightning_hybrid.rewards.deadline import TookTooLong, within

if TYPE_CHECKING:
    import httpx2

LARGEST_ANSWER = 16 * 2**20  # bytes
LARGEST_REFUSAL = 4096  # bytes read of an answer that is no success: enough for a message
EXCERPT = 200  # characters of an answer that a message shows
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TOKEN = re.compile(r"[!#-\[\]-~]+")  # printable ASCII without space, quote and backslash: the same in any notation


class TryFailed(Exception):
    """One request that gave no scores.

    Args:
        problem: What happened.
        fix: What to do about it.
        again: Whether another try may succeed.
        wait: Seconds that the endpoint asks to be left alone.
        answer: What it answered.
    """

    def __init__(
        self, problem: str, fix: str, *, again: bool = True, wait: float = 0.0, answer: bytes | None = None
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix
        self.again = again
        self.wait = wait
        self.answer = answer


class Endpoint:
    """Where requests go, and the token that they carry.

    The token stays in the environment and is read for each request, so that no copy of this object holds it.

    Args:
        url: ``http://`` or ``https://``.
        token_variable: Environment variable with the bearer token; ``None`` for none.

    Raises:
        ConfigError: The URL is none, or holds a password; the variable is missing, or its token cannot be sent; or the
            token would travel unencrypted to another machine.
    """

    def __init__(self, url: str, token_variable: str | None) -> None:
        import httpx2

        try:
            self.url = httpx2.URL(url)
        except (httpx2.InvalidURL, TypeError) as error:
            raise ConfigError(f"the reward's url is not one ({error}): write https://host/path") from error
        self.token_variable = token_variable
        self._check()

    def __str__(self) -> str:
        """The URL without its query, which may hold a key."""
        return str(self.url.copy_with(query=None, fragment=None)) + ("?…" if self.url.query else "")

    def post(self, body: bytes, seconds: float) -> bytes:
        """Send one request and return the body of its successful answer, at most 16 MiB.

        Args:
            body: JSON text.
            seconds: From the look-up of the host's name to the last byte of the answer.

        Raises:
            TryFailed: No answer in time, one that is too large, or another status than success.
        """
        import httpx2

        # The client is closed when time is up, which cuts the connection and so ends the thread that waits on it.
        with httpx2.Client(timeout=seconds, follow_redirects=False, trust_env=not self._stays_here()) as client:
            try:
                return within(seconds, lambda: self._exchange(client, body))
            except (TookTooLong, httpx2.TimeoutException) as error:
                raise TryFailed(
                    f"no whole answer within {seconds:g} seconds", "raise timeout_seconds, or lower the batch size"
                ) from error
            except httpx2.TransportError as error:
                problem = f"{type(error).__name__}: {error}"
                raise TryFailed(problem, "check that the endpoint runs and can be reached from here") from error

    def excerpt(self, answer: bytes) -> str:
        """The beginning of an answer, for a message; withheld where the answer repeats the token."""
        token = self._token()
        if token is not None and token.encode() in answer.replace(rb"\/", b"/"):  # as some write JSON
            return "the answer repeats the token and is not shown"
        text = answer[:LARGEST_REFUSAL].decode(errors="replace")
        return f"the answer begins {text[:EXCERPT]!r}" if text else "the answer is empty"

    def _exchange(self, client: httpx2.Client, body: bytes) -> bytes:
        with client.stream("POST", self.url, content=body, headers=self._headers()) as response:
            limit = LARGEST_ANSWER if response.is_success else LARGEST_REFUSAL
            answer = _read(response, limit)
        if not response.is_success:
            raise self._refusal(response, answer)
        if len(answer) > limit:
            raise TryFailed(f"an answer of more than {limit} bytes", "answer with scores alone", answer=answer)
        return answer

    def _headers(self) -> dict[str, str]:
        # Not compressed: a few bytes could unpack into more than the memory holds.
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        token = self._token()
        return headers if token is None else headers | {"Authorization": f"Bearer {token}"}

    def _refusal(self, response: httpx2.Response, answer: bytes) -> TryFailed:
        status = response.status_code
        again = status == 429 or status >= 500
        wait = seconds_asked(response.headers.get("Retry-After", ""))
        return TryFailed(f"status {status}", self._fix(status), again=again, wait=wait, answer=answer)

    def _fix(self, status: int) -> str:
        if status < 400:
            return "redirects are not followed: set url to where it leads"
        if status in (401, 403):
            named = f"the token in {self.token_variable}" if self.token_variable else "whether it needs token_variable"
            return f"check {named}"
        if status == 429:
            return "give it fewer or smaller batches at a time, or raise retries"
        return "see the endpoint's own log" if status >= 500 else "check url, and what the endpoint expects"

    def _check(self) -> None:
        if self.url.scheme not in ("http", "https") or not self.url.host:
            raise ConfigError(f"the reward's url is {str(self)!r}: write http:// or https:// and a host")
        if self.url.userinfo:
            raise ConfigError("the reward's url holds a user or a password: take it out, and use token_variable")
        if self._token() is not None and self.url.scheme == "http" and not self._stays_here():
            raise ConfigError(
                f"the reward's url is {str(self)!r} and has a token, which plain http would show to everyone on the "
                "way: use https, or an endpoint on this machine"
            )

    def _stays_here(self) -> bool:
        """Whether requests are plain http within this machine, which must then not meet the environment's proxy."""
        if self.url.scheme != "http":
            return False
        try:
            return ipaddress.ip_address(self.url.host).is_loopback
        except ValueError:
            return self.url.host == "localhost"

    def _token(self) -> str | None:
        """The token; what is wrong with it is told without showing it."""
        name = self.token_variable
        if name is None:
            return None
        if not _VARIABLE.fullmatch(name):
            raise ConfigError("token_variable must be the name of an environment variable, not the token itself")
        token = os.environ.get(name, "").strip()
        if not token:
            raise ConfigError(
                f"token_variable is {name!r}, but the environment has no such variable: export {name}=..."
            )
        if not _TOKEN.fullmatch(token):
            raise ConfigError(
                f"the token in the environment variable {name!r} holds a character that a bearer token cannot have, "
                "such as a space, a quote or an umlaut: set it again"
            )
        return token


def seconds_asked(retry_after: str) -> float:
    """Seconds that a ``Retry-After`` header asks for, as a number or a date; 0 where it asks for nothing sensible."""
    text = retry_after.strip()
    if text.isascii() and text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - datetime.now(UTC)).total_seconds())


def _read(response: httpx2.Response, limit: int) -> bytes:
    """The body, or a little more than ``limit`` bytes of it."""
    answer = bytearray()
    for chunk in response.iter_raw():
        answer += chunk
        if len(answer) > limit:
            break
    return bytes(answer)
