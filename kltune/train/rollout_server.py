"""Responses sampled by a vLLM server: each step's adapter under a name of its own, and nothing it says is trusted.

The server gives tokens and says how likely they were; the trainer computes that itself, uses its own numbers, and holds
the two against each other: KL(sampler ‖ trainer) is 0 but for rounding, or the run stops and names what is wrong.
Values, rewards and the controller never leave the trainer; nothing of vLLM is imported.

An adapter is never loaded again from a path or under a name that was there before: a server that keeps what it made of
prompts would go on with that of the old weights.
"""

import json
import secrets
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.divergence import kl_k3
from kltune.core.kl.intervals import KLSummary, cluster_numbers, summarize
from kltune.core.tensors import per_response
from kltune.errors import SamplerError, ServerError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.adapters.weights import POLICY
from kltune.lm.model.batches import Rollout, Samples, response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import assemble, measured_rollout
from kltune.lm.model.snapshot import Snapshot
from kltune.recipe import SamplingSection, load_recipe
from kltune.recipe.faults import printable

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)      # of adapters that vLLM knows
# Nats per token that rounding may put between the two; in float32 it gave 1e-11, a wrong adapter gives 1e-3 and more.
MOST_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-4}
PROBE_RESPONSES, PROBE_TOKENS = 4, 8
CONCURRENT = 64         # requests under way; the server batches them
PAUSES = (0.5, 1.0, 2.0, 4.0)   # seconds before a request is made again
PASSING = {408, 409, 425, 429}  # statuses that another try may not meet, as all from 500 on
STOP_SECONDS = 0.1      # between two looks at whether the run is to stop
LONGEST_ANSWER = 1 << 24        # bytes


@dataclass
class RolloutServer:
    """A vLLM server that samples for a run.

    sampling: the recipe's section. run: its name, which is in those of adapters. stopped: whether the run was asked to
    stop; no answer is waited for then.
    """

    sampling: SamplingSection
    run: str
    stopped: Callable[[], bool] = lambda: False
    base: str = ""
    _published: list[tuple[str, Path]] = field(default_factory=list)
    _before: Snapshot | None = None
    _now: Snapshot | None = None
    _apart: KLSummary | None = None

    def greet(self, policy: Policy, prompts: Sequence[Prompt]) -> None:
        """See that it serves the policy's base as it is trained on, and can take its adapters.

        Raises:
            ServerError: it does not answer. SamplerError: it serves something else, or otherwise.
        """
        if (obstacle := _obstacle(policy)) is not None:
            other = f"or serve it as a model, and measure {self.sampling.url}/v1#MODEL with eval-kl"
            raise SamplerError(self._wrong(obstacle, f"wanted a LoRA of layers alone; {other}"))
        ranks.from_first(lambda: self._read_info(policy))
        some = prompts[:PROBE_RESPONSES]
        uniforms = torch.rand(len(some), PROBE_TOKENS, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with policy.acting_as(None):
            self._held(policy, self._answers(policy, self.base, some, uniforms), "its base")

    def respond(self, policy: Policy, prompts: Sequence[Prompt], uniforms: Tensor, **asked: Any) -> Rollout:
        """Publish the policy, let it answer as ``sample_rollout`` does, and measure the answers.

        uniforms: a row per response, whose first number is its seed. [B, T]. asked: as of ``measured_rollout``.

        Raises:
            ServerError: the server does not answer. SamplerError: it answers with other weights, or otherwise.
        """
        self._before, self._now = self._now, Snapshot(policy.trainable_parameters())
        name = ranks.from_first(lambda: self._publish(policy))
        samples = self._answers(policy, name, prompts, uniforms)
        rollout = measured_rollout(policy, samples, self.sampling.temperature, **asked)
        self._apart = self._held(policy, samples, name, rollout)
        return replace(rollout, rounding=kl_k3(samples.logprobs, rollout.logprobs, samples.response_mask))

    def reported(self) -> dict[str, float | None]:
        """How far the server's distribution of the last responses was from the trainer's, by metric."""
        kl = self._apart
        return {"sampler/kl_nats_per_token": kl.nats_per_token, "sampler/kl_stderr": kl.token_stderr}

    def described(self) -> dict[str, Any]:
        """The same for the document of a measurement."""
        kl = self._apart
        return {"url": self.sampling.url, "kl_nats_per_token": kl.nats_per_token, "kl_stderr": kl.token_stderr}

    # --- the same distribution -----------------------------------------------------------------------------------

    def _held(self, policy: Policy, samples: Samples, name: str, rollout: Rollout | None = None) -> KLSummary:
        """KL(sampler ‖ trainer) of samples, which are refused where it is more than rounding."""
        temperature, mask, said = self.sampling.temperature, samples.response_mask, samples.logprobs

        def under(tau: float = temperature) -> Tensor:
            return response_scatter(policy.measure_logprobs(samples.ids, samples.scored, tau), mask)

        logprobs = under() if rollout is None else rollout.logprobs
        nats = per_response(kl_k3(said, logprobs, mask).double(), mask)
        kl = summarize("k3", nats, samples.lengths, cluster_numbers(samples.prompts))
        most = MOST_KL[policy.dtype]
        if kl.nats_per_token <= most:
            return kl

        def is_of(others: Tensor) -> bool:
            return (per_response(kl_k3(said, others, mask).double(), mask).sum() / mask.sum()).item() <= most

        wrong = int((nats / samples.lengths > most).sum())
        cause = "it serves another base, or an adapter of something else"
        if rollout is not None and is_of(rollout.ref_logprobs):
            cause = "it answers with the base alone, without the adapter"
        elif temperature != 1.0 and is_of(under(1.0)):
            cause = "its log-probabilities are before the temperature; start it with --logprobs-mode processed_logprobs"
        elif self._before is not None and self._is_stale(is_of, under):
            cause = "it answers with the adapter of the step before: is its prefix cache of old weights?"
        elif 0 < wrong < len(nats):
            cause = (
                f"{len(nats) - wrong} of {len(nats)} responses are of the right weights: does an adapter reach one of "
                "several replicas alone (data_parallel_size)?"
            )
        elif (logprobs - said).abs()[mask].mean().item() < 0.05:
            cause = f"it computes in another dtype; wanted --dtype {_dtype(policy)}"
        raise SamplerError(self._wrong(
            f"KL(sampler‖trainer) of {name} is {kl.nats_per_token:.3g} nats per token, and rounding explains {most:g}",
            cause,
        ))

    def _is_stale(self, is_of: Callable[[Tensor], bool], under: Callable[[], Tensor]) -> bool:
        with self._before.in_place():
            return is_of(under())

    def _wrong(self, found: str, cause: str) -> str:
        return f"sampling.url: {self.sampling.url}: {found}: {cause}."

    # --- what goes over the wire -------------------------------------------------------------------------------------

    def _read_info(self, policy: Policy) -> None:
        """Hold what the server says of itself against what the policy needs, and learn what it calls the base."""
        told = self._ask("/server_info?config_format=json", hint=self._start(policy))
        config = told.get("vllm_config") if isinstance(told, dict) else None
        if not isinstance(config, dict):
            raise SamplerError(self._wrong("/server_info says nothing of its configuration", self._start(policy)))
        model, lora, parallel = (config.get(f"{part}_config") or {} for part in ("model", "lora", "parallel"))
        dtype, rank = str(model.get("dtype")).removeprefix("torch."), self._rank(policy)
        if dtype != _dtype(policy):
            raise SamplerError(self._wrong(f"found dtype {dtype}", f"wanted --dtype {_dtype(policy)}"))
        if not str(model.get("logprobs_mode")).endswith("processed_logprobs") and self.sampling.temperature != 1.0:
            raise SamplerError(self._wrong(f"found logprobs_mode {model.get('logprobs_mode')}",
                                           "wanted --logprobs-mode processed_logprobs"))
        if not lora or int(lora.get("max_lora_rank", 0)) < rank:
            found = f"adapters of rank {lora.get('max_lora_rank')} at most" if lora else "no adapters"
            raise SamplerError(self._wrong(f"found {found}", f"wanted rank {rank}: {self._start(policy)}"))
        if int(parallel.get("data_parallel_size", 1)) != 1:
            raise SamplerError(self._wrong(f"found {parallel['data_parallel_size']} replicas",
                                           "an adapter would reach one of them; wanted --data-parallel-size 1"))
        models = self._ask("/v1/models")
        self.base = next(str(entry["id"]) for entry in models["data"] if entry.get("parent") is None)

    def _rank(self, policy: Policy) -> int:
        return max(config.r for config in policy.model.peft_config.values())

    def _start(self, policy: Policy) -> str:
        """The command that starts a server as it has to be."""
        rank = next((rank for rank in RANKS if rank >= self._rank(policy)), RANKS[-1])
        return (
            "start it as VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_SERVER_DEV_MODE=1 vllm serve "
            f"{policy.fingerprint.path if policy.held.own else 'BASE'} --enable-lora --max-lora-rank {rank} "
            f"--max-loras 3 --dtype {_dtype(policy)} --logprobs-mode processed_logprobs"
        )

    def _publish(self, policy: Policy) -> str:
        """Give the server the adapter as it is now, take the one before away; the name it has there."""
        name = f"{self.run}-{secrets.token_hex(6)}"
        folder = Path(self.sampling.publish) / name
        hidden = folder.with_name(f".tmp-{name}")
        hidden.mkdir(parents=True)
        policy.save(hidden)
        hidden.rename(folder)
        try:
            self._ask("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.absolute())})
        except SamplerError:    # where the answer to a first request was lost, the second is one too many
            if name not in {entry["id"] for entry in self._ask("/v1/models")["data"]}:
                raise
        for old, _ in self._published[-1:]:
            self._ask("/v1/unload_lora_adapter", {"lora_name": old})
        for _, path in self._published[:-1]:
            shutil.rmtree(path, ignore_errors=True)
        self._published = [*self._published[-1:], (name, folder)]
        return name

    def close(self) -> None:
        """Take away what is left of the adapters."""
        for name, _ in self._published[-1:]:
            with suppress(ServerError, SamplerError):       # it may be gone, and the run is over
                self._ask("/v1/unload_lora_adapter", {"lora_name": name}, patient=False)
        for _, path in self._published:
            shutil.rmtree(path, ignore_errors=True)
        self._published = []

    def _answers(self, policy: Policy, name: str, prompts: Sequence[Prompt], uniforms: Tensor) -> Samples:
        """Answers of a model by its name there, a request each; asked in the first process alone."""
        per_prompt, limit = len(uniforms) // len(prompts), uniforms.shape[1]

        def ask(row: int) -> tuple[list[int], list[float]]:
            seed = int(uniforms[row, 0].item() * 2**53)      # no neighbour of another's
            body = {
                "model": name, "prompt": list(prompts[row // per_prompt].ids), "n": 1, "max_tokens": limit,
                "temperature": self.sampling.temperature, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
                "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
                "stop_token_ids": list(policy.end_ids), "return_token_ids": True, "seed": seed,
            }
            return self._read_answer(policy, self._ask("/v1/completions", body), limit)

        def all_of_them(_: None) -> ranks.Row:
            tokens, logprobs = zip(*self._together(ask, len(uniforms)), strict=True)
            lengths = [len(row) for row in tokens]
            return torch.tensor(lengths), torch.tensor([*chain(*tokens)]), torch.tensor([*chain(*logprobs)])

        ((lengths, *flat),) = ranks.spread([None], all_of_them)
        rows = ([row.tolist() for row in part.split(lengths.tolist())] for part in flat)
        return assemble(policy, prompts, *rows, limit=limit)

    def _read_answer(self, policy: Policy, answer: Any, limit: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities of one answer, if it is whole and could be the policy's."""
        try:
            choice = answer["choices"][0]
            tokens, reason = [int(token) for token in choice["token_ids"]], choice["finish_reason"]
            logprobs = [float(number) for number in choice["logprobs"]["token_logprobs"]]
        except (LookupError, TypeError, ValueError):
            raise SamplerError(self._wrong("an answer has no token_ids, finish_reason or token_logprobs",
                                           "a vLLM that knows return_token_ids gives them")) from None
        ends = [token in policy.end_ids for token in tokens]
        whole = (reason == "stop" and ends[-1:] == [True]) or (reason == "length" and len(tokens) == limit)
        if not tokens or len(tokens) != len(logprobs) or any(ends[:-1]) or not whole:
            raise SamplerError(self._wrong(
                f"an answer of {len(tokens)} tokens with {len(logprobs)} log-probabilities ended with {reason}",
                f"wanted one that ends with an end token, or at {limit} tokens",
            ))
        return tokens, logprobs

    def _together(self, ask: Callable[[int], Any], count: int) -> list[Any]:
        """What ``ask`` gives of each number, some at a time; the first error of any."""
        answers: list[Any] = [None] * count
        errors: list[Exception] = []
        rows, lock = iter(range(count)), threading.Lock()

        def work() -> None:
            for row in _shared(rows, lock):
                try:
                    answers[row] = ask(row)
                except (ServerError, SamplerError) as error:
                    errors.append(error)
                if errors:
                    return

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(CONCURRENT, count))]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and not errors:
                thread.join(STOP_SECONDS)
                if self.stopped():
                    raise ServerError(f"{self.sampling.url}: was not waited for, as the run is to stop.")
        if errors:
            raise errors[0]
        return answers

    def _ask(self, path: str, body: dict[str, Any] | None = None, hint: str = "", patient: bool = True) -> Any:
        """One request, made again where that may help; JSON, or the text of what is none.

        Raises:
            ServerError: no answer. SamplerError: it refuses.
        """
        address = self.sampling.url.rstrip("/") + path
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json", "User-Agent": "kltune"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        reasons: list[str] = []
        for pause in (*(PAUSES if patient else ()), None):
            try:
                with opener.open(request, timeout=self.sampling.timeout_s) as response:
                    text = response.read(LONGEST_ANSWER).decode("utf-8", "replace")
                with suppress(ValueError):
                    return json.loads(text)
                return text
            except urllib.error.HTTPError as error:
                said = printable(" ".join(error.read(1000).decode("utf-8", "replace").split())[:200])
                why = f"HTTP {error.code} ({said})" if said else f"HTTP {error.code}"
                if error.code < 500 and error.code not in PASSING:
                    refusal = self._wrong(f"refuses {path} with {why}", hint or "its own log says more")
                    raise SamplerError(refusal) from None
            except (OSError, HTTPException) as error:
                reason = getattr(error, "reason", None) or error
                why = str(reason) or repr(reason)
                if isinstance(reason, TimeoutError):
                    pause = None
                    why = f"no answer within {self.sampling.timeout_s:g} s (sampling.timeout_s)"
            reasons.append(why)
            if pause is None or self.stopped():
                break
            time.sleep(pause)
        more = f" Is it up? Then {hint}." if hint else ""
        first = "" if reasons[0] == why else f"; at first: {reasons[0]}"    # what was asked may be what ended it
        raise ServerError(f"sampling.url: {address} does not answer: {why}{first}.{more}")


def _obstacle(policy: Policy) -> str | None:
    """Why no server would answer as the policy, of which it is given the adapter; None where it would."""
    config = getattr(policy.model, "peft_config", {}).get(POLICY)
    if config is None:
        return "the policy is a whole model, and a server is given adapters"
    if config.peft_type.value != "LORA":
        return f"the adapter is of type {config.peft_type.value}"
    places = [name for name, _ in policy.model.named_parameters() if "lora_" in name]
    head = policy.network.head
    changes = {
        "is a DoRA": config.use_dora, "trains a bias": config.bias != "none", "saves modules": config.modules_to_save,
        "changes the embedding": any("lora_embedding" in name for name in places),
        "changes the head": head is not None and any("lora_" in name for name, _ in head.named_parameters()),
    }
    return next((f"the adapter {what}, which vLLM leaves out" for what, found in changes.items() if found), None)


def _dtype(policy: Policy) -> str:
    return str(policy.dtype).removeprefix("torch.")


def server_of(recipe: str | None, temperature: float, run: str) -> RolloutServer | None:
    """Who draws the responses of a measurement by the recipe of this file; None: whoever measures."""
    sampling = None if recipe is None else getattr(load_recipe(recipe), "sampling", None)
    if sampling is None or sampling.engine == "torch":
        return None
    return RolloutServer(sampling.model_copy(update={"temperature": temperature}), run)


def _shared(rows: Iterator[int], lock: threading.Lock) -> Iterator[int]:
    """The rows that no other thread has taken."""
    while True:
        with lock:
            row = next(rows, None)
        if row is None:
            return
        yield row
