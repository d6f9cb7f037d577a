"""A completions server on loopback over a model of transformers, with vLLM's routes and fields, and switches to lie."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class StandIn:
    """What is served. Each switch is one fault.

    temperature: that it samples at whatever is asked, with log-probs as they are (raw) or processed. keep: tokens it
    samples from, of the likeliest. prefix: tokens it puts before every prompt. cap: log-probs it gives at most. fails:
    statuses of its first answers.
    """

    model: nn.Module
    tokenizer: Any
    name: str = "m"
    temperature: float = 1.0
    processed: bool = False
    keep: int | None = None
    prefix: tuple[int, ...] = ()
    cap: int | None = None
    fails: list[int] = field(default_factory=list)
    stale: nn.Module | None = None        # what scores, where it is not what samples
    other_words: bool = False
    says: dict[str, Any] = field(default_factory=dict)          # keys of the choice to put in place of the right ones
    drops: tuple[str, ...] = ()           # keys of the choice to leave out
    short: bool = False
    dies: bool = False
    vocabulary: float = math.inf
    scores: bool = True
    body: bytes | None = None
    called: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    @torch.no_grad()
    def logits(self, ids: list[int], model: nn.Module | None = None) -> Tensor:
        """Of every place. [S, V]"""
        return (model or self.model)(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        prompt = [*self.prefix, *body["prompt"]]
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        top = body.get("logprobs")
        ids, own, heads = [], [], []
        end, limit = self.tokenizer.eos_token_id, max(1, body["max_tokens"] - self.short)
        while len(ids) < limit and end not in ids:
            raw = torch.log_softmax(self.logits(prompt + ids)[-1], -1)
            drawn = torch.log_softmax(raw / self.temperature, -1)
            if self.keep:
                drawn = drawn.masked_fill(drawn < drawn.topk(self.keep).values[-1], -torch.inf).log_softmax(-1)
            token = int(torch.multinomial(drawn.exp(), 1, generator=generator))
            shown = drawn if self.processed else raw
            ids.append(token)
            own.append(float(shown[token]))
            if top is not None:
                heads.append({f"token_id:{t}": v for t, v in self.head(shown, token, top).items()})
        choice = {
            "index": 0, "text": self.tokenizer.decode(ids), "token_ids": ids, "prompt_token_ids": prompt,
            "finish_reason": "stop" if ids[-1] == end else "length",
            "stop_reason": None, "routed_experts": None,
            "logprobs": None if top is None else {
                "text_offset": [0] * len(ids), "token_logprobs": own, "tokens": [f"token_id:{token}" for token in ids],
                "top_logprobs": heads,
            },
            "prompt_logprobs": self.scored(prompt, body) if "prompt_logprobs" in body and self.scores else None,
        } | self.says
        return {"object": "text_completion", "model": self.called or self.name, "usage": {}, "choices": [
            {key: value for key, value in choice.items() if key not in self.drops}
        ]}

    def head(self, logprobs: Tensor, token: int, top: int) -> dict[int, float]:
        """The likeliest tokens, and the one that is there."""
        values, tokens = logprobs.topk(min(top, self.cap or top))
        return {token: float(logprobs[token])} | dict(zip(tokens.tolist(), values.tolist(), strict=True))

    def scored(self, prompt: list[int], body: dict[str, Any]) -> list[Any]:
        """What it makes of the tokens of a prompt."""
        tables = torch.log_softmax(self.logits(prompt, self.stale), -1)
        shift = int(self.other_words)
        return [None] + [
            {str(t): {"logprob": v, "rank": 1, "decoded_token": self.tokenizer.decode([t + shift])}
             for t, v in self.head(tables[place - 1], prompt[place], body["prompt_logprobs"]).items()}
            for place in range(1, len(prompt))
        ]


@dataclass
class LlamaCpp(StandIn):
    """The same as llama.cpp's server says it: each token an entry with its id, and nothing of the prompt.

    hides: places whose entries it leaves out, as it does with tokens that end inside of a character.
    """

    hides: int = 0

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request."""
        answer = StandIn.complete(replace(self, says={}), body)
        choice = answer["choices"][0]
        given, shift = choice["logprobs"] or {"token_logprobs": [], "top_logprobs": []}, int(self.other_words)
        entries = [
            {"id": token, "token": self.tokenizer.decode([token]), "logprob": own, "top_logprobs": [
                {"id": int(name.removeprefix("token_id:")), "logprob": value,
                 "token": self.tokenizer.decode([int(name.removeprefix("token_id:")) + shift])}
                for name, value in sorted(head.items(), key=lambda one: -one[1])[: body["logprobs"]]
            ]}
            for token, own, head in zip(
                choice["token_ids"], given["token_logprobs"], given["top_logprobs"], strict=False
            )
        ]
        shown = {"text": choice["text"], "index": 0, "finish_reason": choice["finish_reason"],
                 "logprobs": {"content": entries[self.hides:]} if entries else None} | self.says
        usage = {"completion_tokens": len(choice["token_ids"])}
        return {"model": answer["model"], "usage": usage, "choices": [shown]}


@contextmanager
def standing_in(server: StandIn) -> Iterator[StandIn]:
    """Within: it answers at ``server.url``."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            status = server.fails.pop(0) if server.fails else 200
            if server.dies:     # as vLLM: all that was under way is told so, then nobody listens
                status = 500 if server.asked.count(body) == 1 else 0
            context = getattr(server.model.config, "max_position_embeddings", math.inf)
            too_long = len(server.prefix) + len(body["prompt"]) + body["max_tokens"] > context
            if too_long or max(body["prompt"]) >= server.vocabulary:
                status = 400
            if status == 0:
                return      # hangs up
            if status != 200:
                data = json.dumps({"error": "no"}).encode()
            else:
                data = json.dumps(server.complete(body)).encode() if server.body is None else server.body
            self.send_response(status)
            if 300 <= status < 400:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, *_: Any) -> None:
            pass

    with Quiet(("127.0.0.1", 0), Handler) as listening:
        server.url = f"http://127.0.0.1:{listening.server_address[1]}/v1#{server.name}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            listening.shutdown()
            thread.join()
