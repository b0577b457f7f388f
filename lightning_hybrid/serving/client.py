"""Asking a role's process."""

from __future__ import annotations

import json
from typing import Any

from lightning_hybrid.errors import ServerError


class ServerClient:
    """Calls the routes of a :class:`~lightning_hybrid.serving.Server`; many threads may use it at once.

    Args:
        url: of the server.
        token: that it wants.
        what: it is, for messages, such as ``vLLM engine 0``.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, token: str, what: str, timeout: float) -> None:
        import httpx2

        self.url, self.what, self.timeout = url, what, timeout
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        # Each thread that waits for an answer has a connection; the environment's proxies are for other addresses.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=None)
        self._http = httpx2.Client(headers=headers, timeout=timeout, trust_env=False, limits=limits)

    def call(self, route: str, **values: Any) -> dict[str, Any]:
        """Ask, and wait for the answer.

        Args:
            route: its name.
            values: the request, as JSON can carry it; numbers arrive as they are, also those that are not finite.

        Raises:
            ServerError: no answer in time, a connection that is lost, or a refusal with the server's own words.
        """
        import httpx2

        try:
            response = self._http.post(f"{self.url}/{route}", content=json.dumps(values).encode())
        except httpx2.TimeoutException as error:
            raise ServerError(
                f"{self.what} at {self.url} gave no answer to /{route} within {self.timeout:g} seconds: it hangs, or "
                "has more to do than that"
            ) from error
        except httpx2.TransportError as error:
            raise ServerError(
                f"{self.what} at {self.url} was lost at /{route} ({type(error).__name__}: {error}): its process has "
                "ended, or cannot be reached from here"
            ) from error
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        raise ServerError(self._refusal(route, response), response.status_code)

    def close(self) -> None:
        """Give its connections back."""
        self._http.close()

    def _refusal(self, route: str, response: Any) -> str:
        try:
            said = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            said = repr(response.text[:200])
        return f"{self.what} at {self.url} answered /{route} with status {response.status_code}: {said}"
