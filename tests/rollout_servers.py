"""A stand-in for a vLLM server with adapters: the same routes over transformers and PEFT, and whatever may be wrong."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

FAULTS = (
    "stale adapter", "no adapter", "raw log-probs", "other dtype", "hangs up", "dies of it", "503", "503 at first",
    "lost answers", "short answer", "two replicas", "slow", "no token ids", "refuses adapters", "other base",
)


@dataclass
class StandIn:
    """What it serves. fault: one of FAULTS, from step ``since`` on, counted by the adapters that were loaded.

    told: what it says of itself otherwise than it should.
    """

    model: torch.nn.Module
    fault: str | None = None
    since: int = 1
    told: dict[str, dict[str, Any]] = field(default_factory=dict)
    url: str = ""
    names: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    lock: Any = field(default_factory=threading.RLock)

    @property
    def now(self) -> str | None:
        """The fault, once it is there."""
        return self.fault if len(self.names) >= self.since else None

    def info(self) -> dict[str, Any]:
        """Of /server_info."""
        told = {"model_config": {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"},
                "lora_config": {"max_lora_rank": 16}, "parallel_config": {"data_parallel_size": 1}}
        return {"vllm_config": {name: told[name] | self.told.get(name, {}) for name in told}}

    def load(self, name: str, path: str) -> None:
        """Take an adapter."""
        assert name not in self.names
        assert path not in self.paths
        self.names.append(name)
        self.paths.append(path)
        if isinstance(self.model, PeftModel):
            self.model.load_adapter(path, adapter_name=name)
        else:
            self.model = PeftModel.from_pretrained(self.model, path, adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One answer, drawn token by token without a cache."""
        name, ids, said = body["model"], list(body["prompt"]), []
        if self.now == "stale adapter":
            name = self.names[-2] if len(self.names) > 1 else name
        if self.now == "no adapter" or (self.now == "two replicas" and len(self.asked) % 2):
            name = "base"
        generator = torch.Generator().manual_seed(body["seed"])
        reason = "length"
        for _ in range(body["max_tokens"]):
            logits = self.logits(name, ids)
            tempered = torch.log_softmax(logits / body["temperature"], dim=-1)
            token = int(torch.multinomial(tempered.exp(), 1, generator=generator))
            shown = torch.log_softmax(logits, dim=-1) if self.now == "raw log-probs" else tempered
            ids.append(token)
            said.append(float(shown[token]))
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        tokens = ids[len(body["prompt"]):]
        if self.now == "short answer":
            tokens, said = tokens[:-1], said[:-1]
        choice = {
            "index": 0, "text": "", "token_ids": tokens, "prompt_token_ids": body["prompt"], "finish_reason": reason,
            "stop_reason": None if reason == "length" else tokens[-1], "prompt_logprobs": None,
            "logprobs": {"token_logprobs": said, "tokens": [""] * len(said), "top_logprobs": [{"": n} for n in said]},
        }
        if self.now == "no token ids":
            del choice["token_ids"]
        return {"object": "text_completion", "model": body["model"], "choices": [choice]}

    def logits(self, name: str, ids: list[int]) -> torch.Tensor:
        """After the last token. [V] float32."""
        if isinstance(self.model, PeftModel):
            if name == "base":
                with self.model.disable_adapter():
                    return self.read(ids)
            self.model.set_adapter(name)
        return self.read(ids)

    def read(self, ids: list[int]) -> torch.Tensor:
        """The same, with the weights as they are."""
        if self.now != "other dtype":
            return self.model(torch.tensor([ids])).logits[0, -1].float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.model(torch.tensor([ids])).logits[0, -1].float()


@contextmanager
def serving(folder: Path, fault: str | None = None, since: int = 1, **told: dict[str, Any]) -> Iterator[StandIn]:
    """Within: a server of a model's folder at ``url``."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if fault == "other base":
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.3)
    stand_in = StandIn(model, fault, since, told)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, value: Any, status: int = 200) -> None:
            data = (value if isinstance(value, str) else json.dumps(value)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            if self.path.startswith("/server_info"):
                return self.answer(stand_in.info())
            adapters = [{"id": name, "parent": "base"} for name in ("other", *stand_in.names)]
            return self.answer({"object": "list", "data": [{"id": "base", "parent": None}, *adapters]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stand_in.lock:
                if self.path == "/v1/load_lora_adapter":
                    if stand_in.fault == "refuses adapters":
                        return self.answer({"error": "adapters cannot be loaded"}, 404)
                    if body["lora_name"] in stand_in.names:
                        said = f"The lora adapter '{body['lora_name']}' has already been loaded."
                        return self.answer({"error": {"message": said, "code": 400}}, 400)
                    stand_in.load(body["lora_name"], body["lora_path"])
                    return None if stand_in.fault == "lost answers" else self.answer("Success")
                if self.path == "/v1/unload_lora_adapter":
                    stand_in.unloaded.append(body["lora_name"])
                    return self.answer("Success")
                stand_in.asked.append(body)
                fault = stand_in.now
                if fault == "hangs up" or (fault == "dies of it" and stand_in.asked.count(body) > 1):
                    return None
                if fault == "dies of it":       # as vLLM: all that was under way is told so, then nobody listens
                    return self.answer({"error": {"message": "EngineCore encountered an issue.", "code": 500}}, 500)
                if fault == "503" or (fault == "503 at first" and len(stand_in.asked) % 7 == 0):
                    return self.answer({"error": "busy"}, 503)
                if fault != "slow":
                    return self.answer(stand_in.complete(body))
            time.sleep(16.0)
            return None

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stand_in.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
