"""Saved reward models as scorers: on the policy's own weights where they were trained on those, else on their own.

On the policy's weights a reward model is one more adapter, and reads the very tokens that were sampled. On weights of
its own it reads text, cut into tokens by its own tokenizer. Either way a response that was cut off at the length limit
is read up to its last token, without the end token that it never said: as responses cut by ``data.on_overlong`` are in
training.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kltune.errors import ModelError
from kltune.lm.adapters import POLICY, config_to_fill, fill, load_compatible
from kltune.lm.batches import Samples
from kltune.lm.data import last_tokens
from kltune.lm.encoding import Encoder, Ids
from kltune.lm.opening import load_reference, probe_logits
from kltune.lm.policy import Policy
from kltune.lm.reward_model import HEAD, RewardModel
from kltune.lm.rows import RowFault
from kltune.recipe import ModelSection

FILES = ("adapter_model.safetensors", HEAD)
ADAPTER = "reward"      # its name beside the policy's; a second one gets a number


@dataclass(frozen=True)
class RewardReader:
    """A reward model that reads responses. shared: its tokens are the policy's, because its trunk is."""

    model: RewardModel
    shared: bool

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores of texts, each response taken to have ended."""
        return self._read_texts(prompts, responses, [True] * len(responses))

    def read(self, samples: Samples) -> list[float]:
        """Scores of sampled responses."""
        if not self.shared:
            return self._read_texts(samples.prompts, samples.responses, (~samples.truncated).tolist())
        places = torch.arange(samples.ids.shape[1], device=samples.ids.device)
        last = places == (samples.scored * places).amax(dim=1, keepdim=True)
        return self.model.measure(samples.ids, last).tolist()

    def _read_texts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        policy = self.model.policy
        encoder, rows = Encoder(policy.tokenizer, "none"), zip(prompts, responses, ended, strict=True)
        return self.model.measure_rows([spelled(encoder, *row, limit=policy.max_context) for row in rows]).tolist()


def spelled(encoder: Encoder, prompt: str, response: str, ended: bool, limit: int | None) -> Ids:
    """The tokens of a prompt and a response as training data have them, cut from the left to ``limit``.

    Raises:
        ModelError: there is nothing to read.
    """
    end = encoder.tokenizer.eos_token_id
    ids = (_tokens(encoder.opening, prompt) or encoder.head) + _tokens(encoder.continuing, response)
    if ended and end is not None and ids[-1:] != (end,):
        ids += (end,)
    if not ids:
        raise ModelError("a prompt and a response without any token cannot be scored.")
    return ids if limit is None else last_tokens(ids, limit, encoder.tokenizer.bos_token_id)


def _tokens(encode: Callable[[str], Ids], text: str) -> Ids:
    """The tokens of a text, () where the tokenizer makes none of it: a policy may say nothing at all."""
    try:
        return encode(text)
    except RowFault:
        return ()


def is_reward_model(folder: Path) -> bool:
    """Whether ``kltune reward`` made what is there."""
    return (folder / HEAD).is_file()


def open_reward_model(folder: Path, policy: Policy | None, device: torch.device) -> tuple[RewardReader, str, str]:
    """Open a reward model that ``kltune reward`` saved, and try it on the tokens that were kept with it.

    Args:
        folder: the checkpoint.
        policy: whose trunk it may share; None shares nothing.
        device: for weights of its own.

    Returns:
        (reader, sha256 of adapter and head, one line on whose weights it reads with).

    Raises:
        ModelError: it is damaged, no reward model, or its base is not the one it was trained on; or it needs weights
            of its own but cannot read plain text.
    """
    record = _read_record(folder)
    obstacles = ["there is no policy"] if policy is None else _obstacles(policy, record)
    if not obstacles:
        model = _beside(folder, policy)
    elif record["reward"]["reads_text"]:
        model = _alone(folder, record["reference"], device)
    else:
        raise ModelError(
            f"reward {folder}: it was trained on tokens that the text of a prompt and a response does not give again "
            "(a chat template's), so it can only read those of a policy on the same weights. They are not the same:\n"
            "  " + "\n  ".join(obstacles)
        )
    model.load_head(folder)
    model.check_probe(record["reward"]["probe"], folder)
    if not obstacles:
        size = sum((folder / name).stat().st_size for name in FILES) / 1e6
        note = f"shares the policy's weights; its adapter and head take {size:.2g} MB"
    else:
        whole = sum(tensor.numel() * tensor.element_size() for tensor in model.policy.model.parameters()) / 1e6
        note = f"has weights of its own, {whole:.3g} MB, and reads text: " + "; ".join(obstacles)
    return RewardReader(model, shared=not obstacles), _sha256(folder), f"reward {folder}: {note}"


def _read_record(folder: Path) -> dict[str, Any]:
    """The kltune.json of a reward model."""
    try:
        record = json.loads((folder / "kltune.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"reward {folder}: its kltune.json cannot be read ({error}).") from None
    known = isinstance(record, dict) and record.get("stage") == "reward"
    if not known or not {"probe", "reads_text"} <= record.get("reward", {}).keys() or not record.get("reference"):
        raise ModelError(f"reward {folder}: its kltune.json is not one that kltune reward wrote.")
    return record


def _obstacles(policy: Policy, record: dict[str, Any]) -> list[str]:
    """Why a reward model cannot lie on the policy's trunk; [] if it can."""
    if policy.full:
        return ["the policy has weights of its own beside its reference's"]
    adapter = getattr(policy.model, "peft_config", {}).get(POLICY)
    if adapter is None or adapter.peft_type != "LORA":
        return ["the policy's adapter is no LoRA"]
    return policy.fingerprint.differences(record["reference"])


def _beside(folder: Path, policy: Policy) -> RewardModel:
    """One more adapter on the policy's trunk, which must not move a bit of the policy."""
    number = sum(name.startswith(ADAPTER) for name in policy.model.peft_config)
    name = f"{ADAPTER}{number or ''}"
    weights, probe = load_compatible(folder, policy.model), probe_logits(policy)
    try:
        policy.add_beside(name, config_to_fill(folder))
    except ValueError as error:
        raise ModelError(f"reward {folder}: does not fit {policy.fingerprint.path}: {error}") from error
    fill(policy.model, weights, folder, name)
    if not torch.equal(probe, probe_logits(policy)):
        raise ModelError(f"reward {folder}: beside the policy's adapter it changes the policy; nothing was trained.")
    return RewardModel(policy, name)


def _alone(folder: Path, reference: dict[str, Any], device: torch.device) -> RewardModel:
    """Its own base, tokenizer and adapter, as it was trained."""
    section = ModelSection(**{name: reference[name] for name in ("path", "sft_adapter", "dtype")})
    policy = load_reference(section, device=device, where=f"reward {folder}")
    if differences := policy.fingerprint.differences(reference):
        raise ModelError(f"reward {folder}: its base is not the one it was trained on.\n  " + "\n  ".join(differences))
    policy.load_adapter(folder)
    for tensor in policy.trainable_parameters().values():
        tensor.requires_grad_(False)
    return RewardModel(policy)


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in FILES:
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()
