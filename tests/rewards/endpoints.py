"""A real HTTP server on this machine that answers as it is told, one reply after the other."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.texts, dict(self.headers)))
        with suppress(ConnectionError):  # a client that has given up
            self.server.next_reply()(self)
        self.close_connection = True

    def start(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, replies: Sequence[Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies = list(replies)
        self.requests: list[tuple[dict[str, list[str]], dict[str, str]]] = []
        self.leaving = threading.Event()

    def next_reply(self) -> Reply:
        """In the order given; the last one for ever."""
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score"


@contextmanager
def serving(*replies: Reply) -> Iterator[Server]:
    with Server(replies) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.leaving.set()
        server.shutdown()
        thread.join()


def body(content: bytes | str, status: int = 200, **headers: str) -> Reply:
    """A whole answer with this body."""
    data = content if isinstance(content, bytes) else content.encode()

    def reply(handler: Handler) -> None:
        handler.start(status, Content_Length=str(len(data)), **headers)
        handler.wfile.write(data)

    return reply


def lengths(handler: Handler) -> None:
    """The good answer: the length of each response."""
    body(json.dumps({"scores": [len(response) for response in handler.texts["responses"]]}))(handler)


def silent(handler: Handler) -> None:
    handler.server.leaving.wait(30)


def dripping_body(handler: Handler) -> None:
    handler.start(Content_Length="100000")
    _drip(handler)


def dripping_headers(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    _drip(handler)


def _drip(handler: Handler) -> None:
    for _ in range(300):
        if handler.server.leaving.is_set():
            return
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler: Handler) -> None:
    handler.start()
    while not handler.server.leaving.is_set():
        handler.wfile.write(b"[" * 2**16)


def dies_midway(handler: Handler) -> None:
    handler.start(Content_Length="1000")
    handler.wfile.write(b'{"scores": [1, 2')


def repeats_what_it_was_sent(handler: Handler) -> None:
    body(f"headers were {handler.headers}", 400)(handler)
