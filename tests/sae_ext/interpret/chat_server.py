"""A real HTTP server on loopback that speaks the chat API and fails as its script says."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PASSAGE = re.compile(r'^(e\d+): (".*")$', re.MULTILINE)
_DESCRIPTION = re.compile(r'^Description: "fires on (.*)"$', re.MULTILINE)


def completion(content: str | None, finish_reason: str = "stop", **message: Any) -> bytes:
    body = {
        "choices": [{"message": {"content": content, **message}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 3},
    }
    return json.dumps(body).encode()


@dataclass
class Step:
    """What the server does with one request."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    stall: bool = False
    """Send the headers and one byte now and then until the server is stopped."""
    hang_up: bool = False


def says(content: str | None, finish_reason: str = "stop", **message: Any) -> Step:
    return Step(body=completion(content, finish_reason, **message))


def sensible(prompt: str) -> Step:
    """What a good model says: explains by the first marked word, judges by its presence."""
    passages = _PASSAGE.findall(prompt)
    if not passages:
        word = re.search("⟦(.*?)⟧", prompt.split("strength", 2)[-1])
        return says(json.dumps({"explanation": f"fires on {word[1] if word else '?'}"}))
    description = _DESCRIPTION.search(prompt)
    word = description[1] if description else "?"
    return says(json.dumps({i: word in json.loads(text).split() for i, text in passages}))


class ChatServer(ThreadingHTTPServer):
    """Plays the steps of `script` in turn, and answers sensibly once they are used up."""

    daemon_threads = True

    def __init__(self, script: Sequence[Step] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script = list(script)
        self.prompts: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.authorizations: list[str | None] = []
        self.stopped = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = request["messages"][-1]["content"]
        with self.server.lock:
            self.server.requests.append(request)
            self.server.prompts.append(prompt)
            self.server.authorizations.append(self.headers["Authorization"])
            step = self.server.script.pop(0) if self.server.script else sensible(prompt)
        if step.hang_up:
            self.close_connection = True
            return
        self.send_response(step.status)
        for name, value in step.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(10_000 if step.stall else len(step.body)))
        self.end_headers()
        try:
            self.wfile.write(step.body)
            while step.stall and not self.server.stopped.wait(0.05):
                self.wfile.write(b" ")
        except OSError:
            self.close_connection = True  # the client has had enough

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(*script: Step) -> Iterator[ChatServer]:
    server = ChatServer(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()
