"""A model that is served: responses and log-probabilities by token id, from an OpenAI-compatible completions endpoint.

Nothing that a server says is taken on trust: each answer is looked through, and the same tokens are scored twice.
Servers: vLLM; llama.cpp's, which scores no tokens that are there; others that give ids and log-probs as one of them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from kltune.errors import ModelError, RecipeError
from kltune.lm.rewards.http_client import Address, Client, Unanswered, is_loopback

TRIES, FIRST_PAUSE = 4, 0.5     # seconds before the second try, doubled before each further one
CONCURRENCY = 8
LONGEST = 1 << 28       # bytes of an answer: twenty log-probs at each of some thousand tokens
TIMEOUT_S = 120.0
ROUNDING = 1e-3         # by which the probabilities of a few tokens may add up to more than 1
NO_FILTER = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "n": 1, "stream": False, "return_token_ids": True, "return_tokens_as_token_ids": True,
}
START = ("kltune needs token ids and log-probs: return_token_ids, return_tokens_as_token_ids and prompt_logprobs of "
         "vLLM's completions endpoint")


@dataclass(frozen=True)
class Place:
    """What a server says of one token of a response.

    head: log-probs of the likeliest tokens, by id; nats. words: how it spells tokens, by id, as far as it says.
    """

    token: int
    logprob: float
    head: dict[int, float]
    words: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One response. places: of its tokens, in order. truncated: it reached the length limit."""

    places: tuple[Place, ...]
    truncated: bool

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return [place.token for place in self.places]


class CannotScore(ModelError):
    """A server that gives no log-probs of tokens that are there, and so can be no reference."""


class NoAnswer(ModelError):
    """A server that is away, or too busy, now."""


def is_address(path: str) -> bool:
    """Whether a checkpoint or reference is a server's."""
    return path.startswith(("http://", "https://"))


class Server:
    """A served model that is asked for so many of the likeliest tokens at each place."""

    def __init__(self, path: str, top: int, key_env: str | None = None):
        """Look at ``http(s)://HOST/v1#MODEL`` and the key; nothing is sent yet.

        Raises:
            RecipeError: it is no such address, or the key would be readable on its way.
        """
        address, _, self.model = path.partition("#")
        try:
            url = urlsplit(address)
            sound = bool(url.hostname) and (url.port is None or url.port > 0) and bool(self.model) and not url.query
        except ValueError:
            url, sound = urlsplit(""), False
        if "@" in url.netloc:
            raise RecipeError("a server's address with a user in it; a key goes into an environment variable: "
                              "--key-env NAME.")
        if not sound or " " in address or not address.isascii():
            raise RecipeError(f"{path}: wanted a server's address and model, as http://127.0.0.1:8000/v1#MODEL.")
        if url.scheme == "http" and not is_loopback(address):
            raise RecipeError(f"{path}: over http whoever listens can read and change what is measured; wanted "
                              "https://, or an address of this machine.")
        if key_env is not None and not os.environ.get(key_env):
            raise RecipeError(f"--key-env {key_env}: this environment variable is not set.")
        self.path, self.top, self.host = path, top, url.netloc
        self.notes: list[str] = []      # what could not be looked at
        self._client = Client(Address(address, f"server {self.model}", ModelError, key_env, TIMEOUT_S, LONGEST))

    def sample(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """One response to each prompt, a request each, with seeds that are no neighbours."""
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts)) & 0x7FFFFFFF
        return self._all([
            ({"prompt": list(ids), "max_tokens": max_new_tokens, "seed": own, "logprobs": self.top}, max_new_tokens)
            for ids, own in zip(prompts, seeds.tolist(), strict=True)
        ], self._sampled, progress)

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Answer]:
        """The log-probabilities of (prompt, response) tokens that are there."""
        return self._all([
            ({"prompt": [*prompt, *response], "max_tokens": 1, "prompt_logprobs": self.top}, response)
            for prompt, response in rows
        ], self._scored)

    def _all(
        self, questions: list[tuple[dict[str, Any], Any]], read: Any,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            found = [pool.submit(lambda body, about: read(self._asked(body), body, about), *one) for one in questions]
            answers: list[Answer] = []
            try:
                for future in found:
                    answers.append(future.result())
                    progress(len(answers))
                return answers
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _asked(self, question: dict[str, Any]) -> dict[str, Any]:
        """The one choice of an answer."""
        body, pause = {"model": self.model} | NO_FILTER | question, FIRST_PAUSE
        reasons: list[str] = []
        for number in range(1, TRIES + 1):
            try:
                answer = self._client.post("/completions", body)
                break
            except Unanswered as reason:
                reasons.append(str(reason))
                if number == TRIES:     # what was asked may be what ended the server: the first try says so
                    first = "" if reasons[0] == reasons[-1] else f"; at first: {reasons[0]}"
                    raise NoAnswer(f"{self.path}: no answer in {TRIES} tries; the last: {reason}{first}.") from None
                time.sleep(max(pause, min(reason.after, 60.0)))
                pause *= 2
        try:
            content = json.loads(answer)
            choices, model = content["choices"], content.get("model")
            choice = choices[0]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise self._fault("its answer is no completion in JSON") from None
        if len(choices) != 1 or not isinstance(choice, dict):
            raise self._fault(f"asked for one completion, got {len(choices)}")
        if model not in (None, self.model):
            raise self._fault(f"it answers as the model {self._client.shown(str(model))}")
        echoed = choice.get("prompt_token_ids") or content.get("prompt_token_ids")
        if echoed is not None and list(echoed) != question["prompt"]:
            raise self._fault(f"it read {len(echoed)} tokens of prompt, other ones than the {len(question['prompt'])} "
                              "that were sent: does it cut prompts, or put a token before them?")
        return choice | {"usage": content.get("usage")}

    def _sampled(self, choice: dict[str, Any], body: dict[str, Any], limit: int) -> Answer:
        if isinstance(entries := (choice.get("logprobs") or {}).get("content"), list):
            choice = choice | self._of_entries(entries, choice["usage"])
        ids, given, words = choice.get("token_ids"), choice.get("logprobs") or {}, choice.get("words") or {}
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise self._fault(f"its answer has no token ids. {START}")
        heads, own = given.get("top_logprobs"), given.get("token_logprobs")
        if not isinstance(heads, list) or not isinstance(own, list) or not len(heads) == len(own) == len(ids):
            raise self._fault(f"its answer has no log-probs for each of {len(ids)} tokens. {START}")
        finish = choice.get("finish_reason")
        if finish not in ("stop", "length") or not ids or len(ids) > limit:
            raise self._fault(f"{len(ids)} of at most {limit} tokens, and ended for {finish!r}; wanted stop or length")
        if finish == "length" and len(ids) < limit:
            raise self._fault(f"it cut a response at {len(ids)} tokens, asked for {limit}; is its context full?")
        places = []
        for token, logprob, head in zip(ids, own, heads, strict=True):
            place = self._place(token, logprob, {_id_of(name): value for name, value in (head or {}).items()})
            places.append(replace(place, words=words))
        return Answer(tuple(places), finish == "length")

    def _of_entries(self, entries: list[Any], usage: Any) -> dict[str, Any]:
        """What llama.cpp's server says of each token with its id, in vLLM's fields."""
        tops = [entry.get("top_logprobs") if isinstance(entry, dict) else None for entry in entries]
        every = [*entries, *(one for top in tops if isinstance(top, list) for one in top)]
        if None in tops or not all(isinstance(one, dict) and {"id", "logprob"} <= one.keys() for one in every):
            raise self._fault(f"its log-probs name no ids of tokens. {START}")
        if isinstance(usage, dict) and usage.get("completion_tokens") not in (None, len(entries)):
            raise self._fault(f"it gives log-probs of {len(entries)} of {usage['completion_tokens']} tokens: llama.cpp "
                              "leaves out those that end inside of a character. Ask for prompts, or a --seed, whose "
                              "answers have none")
        heads = [{str(one["id"]): one["logprob"] for one in top} for top in tops]
        return {
            "token_ids": [entry["id"] for entry in entries],
            "logprobs": {"token_logprobs": [entry["logprob"] for entry in entries], "top_logprobs": heads},
            "words": {one["id"]: one["token"] for top in tops for one in top if isinstance(one.get("token"), str)},
        }

    def _scored(self, choice: dict[str, Any], body: dict[str, Any], response: Sequence[int]) -> Answer:
        given = choice.get("prompt_logprobs")
        if not isinstance(given, list) or len(given) != len(body["prompt"]):
            raise CannotScore(f"{self.path}: it gives no log-probs of a prompt, so it cannot be a reference. {START}.")
        places = []
        for token, head in zip(response, given[len(given) - len(response):], strict=True):
            values = {_id_of(name): _value_of(entry) for name, entry in (head or {}).items()}
            place = self._place(token, values.get(token), values)
            words = {_id_of(name): entry["decoded_token"] for name, entry in (head or {}).items()
                     if isinstance(entry, dict) and isinstance(entry.get("decoded_token"), str)}
            places.append(replace(place, words=words))
        return Answer(tuple(places), False)

    def _place(self, token: int, logprob: Any, head: dict[int | None, Any]) -> Place:
        """One token with the k likeliest: the one that was drawn stands beside them where it is none of these."""
        values = [logprob, *head.values()]
        if None in head:
            raise self._fault(f"it names tokens by their text and not by id. {START}")
        if not all(isinstance(value, int | float) and math.isfinite(value) and value <= ROUNDING for value in values):
            raise self._fault(f"a log-probability of token {token} is missing, no number or above 0")
        if abs(head.get(token, logprob) - logprob) > ROUNDING:
            raise self._fault(f"it gives token {token} two log-probs, {logprob:.4g} and {head[token]:.4g}")
        if len(head) > self.top:
            head = {other: value for other, value in head.items() if other != token}
        if len(head) != self.top:
            raise self._fault(f"asked for {self.top} log-probs at each token, got {len(head)}; ask for as many as it "
                              "gives (--top-logprobs), or let it give more (vllm serve --max-logprobs)")
        if (mass := sum(math.exp(value) for value in head.values())) > 1.0 + ROUNDING:
            raise self._fault(f"the probabilities of {self.top} tokens add up to {mass:.4g}: they are of no "
                              "distribution")
        return Place(token, float(logprob), head)

    def _fault(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}.")


def _id_of(name: str) -> int | None:
    """The id in ``token_id:5`` or ``5``; None for a token's text."""
    text = str(name).removeprefix("token_id:")
    return int(text) if text.isascii() and text.isdecimal() else None


def _value_of(entry: Any) -> Any:
    return entry.get("logprob") if isinstance(entry, dict) else entry
