"""One question to an OpenAI-compatible chat endpoint, and the text of its answer."""

import json
from typing import Any

from kltune.errors import ScorerError
from kltune.lm.rewards.http_client import Address, Client
from kltune.recipe import JudgeReward

Messages = list[dict[str, str]]


class Endpoint:
    """A chat endpoint that answers one question at a time. Threads may share one."""

    def __init__(self, entry: JudgeReward):
        """Look the key up; nothing is sent yet; raises ScorerError as ``Client``."""
        self.entry = entry
        self._client = Client(Address(
            entry.url, f"judge {entry.model}", ScorerError, entry.key_env, entry.timeout_s,
            busy=f", with up to {entry.concurrency} questions under way",
        ))

    def ask(self, messages: Messages) -> str:
        """The text of one answer; "" where the endpoint gives none. Raises as ``Client.post``, ScorerError."""
        entry = self.entry
        optional = {"temperature": entry.temperature, "max_tokens": entry.max_tokens}
        body: dict[str, Any] = {"model": entry.model, "messages": messages, "stream": False}
        body |= {name: value for name, value in optional.items() if value is not None}
        return _content(self._client.post("/chat/completions", body))


def _content(body: bytes) -> str:
    """The text in a chat completion; "" in anything else."""
    try:
        choice = json.loads(body)["choices"][0]
        text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return ""
    if not isinstance(text, str):
        return ""
    # The last word of a text that was cut may be the first half of one: 1 of 10. A server that only counts tokens calls
    # an answer cut that ended with the last one allowed.
    return text.rpartition(" ")[0] if cut and not text.endswith("}") else text
