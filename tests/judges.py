"""A chat endpoint on loopback: a real HTTP server, whose answers a test decides."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kltune.recipe import JudgeReward


@dataclass
class Reply:
    """What comes back: a text as the answer of a chat model, or a body as it is; after so many seconds."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    finish: str = "stop"
    hang_up: bool = False


class Endpoint:
    """The server and what it was asked. answer: from the number of the question and its last message to a reply."""

    def __init__(self, answer: Callable[[int, str], Reply | str]):
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most_at_once = self._now = 0
        self._lock = threading.Lock()
        self.url = ""

    def entry(self, **keys: Any) -> JudgeReward:
        """The recipe's entry for it; impatient."""
        return JudgeReward(**({"kind": "judge", "url": self.url, "model": "m", "retries": 2, "timeout_s": 5.0} | keys))

    def reply(self, body: dict[str, Any], headers: dict[str, str], path: str) -> Reply:
        """Note the question, and have it answered."""
        with self._lock:
            number = len(self.asked)
            self.asked.append(body)
            self.headers.append(headers)
            self.paths.append(path)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            found = self.answer(number, body["messages"][-1]["content"])
            reply = Reply(found) if isinstance(found, str) else found
            time.sleep(reply.seconds)
            return reply
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(answer: Callable[[int, str], Reply | str], port: int = 0) -> Iterator[Endpoint]:
    """Within: the endpoint answers at ``endpoint.url``."""
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = endpoint.reply(body, dict(self.headers), self.path)
            if reply.hang_up:
                return
            choice = {"message": {"role": "assistant", "content": reply.text}, "finish_reason": reply.finish}
            data = json.dumps({"choices": [choice]}).encode() if reply.body is None else reply.body
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(data))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            pass  # whoever gave up waiting has hung up

    with Server(("127.0.0.1", port), Handler) as server:
        endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield endpoint
        finally:
            server.shutdown()
            thread.join()


def part(question: str, name: str) -> str:
    """What stands in a question under a name, as "response"."""
    return question.split(f"[{name}]\n", 1)[1].split(f"\n[end of {name}]", 1)[0]
