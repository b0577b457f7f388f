"""What runs in the process of a role: a few routes behind a token, for as long as somebody holds its stdin open."""

from __future__ import annotations

import atexit
import hmac
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import IO, Any

from typing_extensions import override

from lightning_hybrid.errors import ConfigError, LightningHybridError, RewardError, RolloutError
from lightning_hybrid.serving.addresses import LOOPBACK

Route = Callable[[dict[str, Any]], dict[str, Any]]
# The fault of who asks, such as a text that is too long; everything else is the server's.
REFUSALS = (ConfigError, RolloutError, RewardError)
LARGEST_REQUEST = 1 << 31  # bytes
INTERVAL = 1.0  # seconds between two looks at whether the starter lives
GRACE = 5.0  # seconds to end in order when it does not


class Server:
    """Answers ``POST /<route>`` with JSON, and ``GET /health``; from its construction on it listens at a free port.

    Requests run side by side, each in a thread of its own. An error of a route is an answer; the server goes on.

    Args:
        routes: by name; each takes a request's JSON object and returns one.
        token: without which nothing is answered but ``/health``.
        host: to listen at.

    Attributes:
        url: ``http://host:port``.
    """

    def __init__(self, routes: Mapping[str, Route], token: str, host: str = LOOPBACK) -> None:
        self._http = _HTTPServer((host, 0), _Handler)
        self._http.routes, self._http.token = routes, token
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self._http.server_address[1]}"
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Answer from now on, in the background."""
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no more, and give the port back."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def serve(self) -> None:
        """Answer until this process is told to end, see :func:`main_of`."""
        self.start()
        try:
            threading.Event().wait()
        finally:
            self.close()


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True  # one that hangs holds nobody up
    request_queue_size = 128  # ranks that all ask at once
    routes: Mapping[str, Route]
    token: str

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that left needs no answer
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer in one piece
    server: _HTTPServer

    def do_GET(self) -> None:
        """Whether the server answers."""
        if self.path == "/health":
            self._answer(200, {"ok": True})
        else:
            self._refuse(404, f"there is no {self.path!r} to get")

    def do_POST(self) -> None:
        """Call a route."""
        given, wanted = self.headers.get("Authorization", ""), f"Bearer {self.server.token}"
        if not hmac.compare_digest(given.encode(), wanted.encode()):
            self._refuse(401, "the token is missing or wrong")
            return
        route = self.server.routes.get(self.path.removeprefix("/"))
        if route is None:
            self._refuse(404, f"there is no route {self.path!r}; there are {', '.join(self.server.routes)}")
            return
        try:
            request = self._request()
        except ValueError as error:
            self._refuse(400, f"the request is no JSON object with its Content-Length: {error}")
            return
        self._answer(*_called(route, request))

    def _request(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length", ""))
        if not 0 <= length <= LARGEST_REQUEST:
            raise ValueError(f"it has {length} bytes")
        request = json.loads(self.rfile.read(length))
        if not isinstance(request, dict):
            raise ValueError(f"it is a {type(request).__name__}")
        return request

    def _refuse(self, status: int, problem: str) -> None:
        self.close_connection = True  # what it holds was not read
        self._answer(status, {"error": problem})

    def _answer(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    @override
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""


def _called(route: Route, request: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Status and answer."""
    try:
        answer = route(request)
        json.dumps(answer)
    except REFUSALS as error:
        return HTTPStatus.BAD_REQUEST, {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:
        traceback.print_exc()
        return 500, {"error": f"{type(error).__name__}: {error}"}
    return 200, answer


def main_of(make: Callable[[dict[str, Any]], Mapping[str, Route]]) -> None:
    """The whole of a module that is run with ``python -m`` as the process of a role.

    It reads one line of JSON from stdin, ``{"settings": …, "token": …, "host": …}``; answers with one line on stdout,
    ``{"url": …}`` or ``{"error": …}``; and serves until stdin closes, because whoever started it is gone, or until
    SIGTERM. What others print goes to stderr.

    Args:
        make: from settings to routes; it may load a model.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        starter = os.getppid()
        line = sys.stdin.buffer.readline()
        if not line:
            return
        signal.signal(signal.SIGTERM, _end)
        atexit.register(end_children)
        # Also while it loads, of which nothing but another thread can say that it is no longer needed.
        threading.Thread(target=_end_after, args=(starter,), daemon=True).start()
        server = _made(make, json.loads(line), answers)
    server.serve()


def _made(make: Callable[[dict[str, Any]], Mapping[str, Route]], order: dict[str, Any], answers: IO[str]) -> Server:
    try:
        server = Server(make(order["settings"]), order["token"], order["host"])
    except Exception as error:
        traceback.print_exc()
        own = isinstance(error, LightningHybridError)
        _say(answers, {"error": str(error) if own else f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from error
    _say(answers, {"url": server.url})
    return server


def _say(answers: IO[str], answer: dict[str, str]) -> None:
    with suppress(BrokenPipeError):  # the starter is gone, which the other thread sees to
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end(*_: object) -> None:
    """In the main thread, on SIGTERM: end in order."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


def end_children() -> None:
    """What this process started and has left running, in the session that its starter gave it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)


def _end_after(starter: int) -> None:
    """When the starter lets go of stdin, or is gone: end this process and what it started; in order, if quick."""
    # One that the starter forked may hold the other end of stdin longer than the starter lives.
    while os.getppid() == starter and not select.select([0], [], [], INTERVAL)[0]:
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
