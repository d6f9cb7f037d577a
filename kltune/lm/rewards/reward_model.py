"""A reward model: an adapter on the frozen trunk, and a head that reads the last token of a response.

While it is trained, its adapter is the policy's own (a reward model is not sampled from). Afterwards the same adapter
can lie beside a policy's on one trunk: policy, reference, value function and reward model are then one set of weights,
and it reads the very tokens that were sampled. On weights of its own it reads text, cut into tokens by its own
tokenizer. Either way a response that was cut off at the length limit is read up to its last token, without the end
token that it never said: as responses cut by ``data.on_overlong`` are in training.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kltune.errors import ModelError
from kltune.lm.data.chat import template_of
from kltune.lm.data.documents import SavedModel
from kltune.lm.data.encoding import Encoder, Ids, spelled
from kltune.lm.data.examples import Prompt
from kltune.lm.data.foreign import read_json
from kltune.lm.model.adapters.weights import POLICY
from kltune.lm.model.batches import Samples
from kltune.lm.model.files import reading, refuse_code
from kltune.lm.model.fingerprint import AGREES, section_of
from kltune.lm.model.loading import own_tokenizer
from kltune.lm.model.network import ScalarHead
from kltune.lm.model.opening import load_reference, put_beside
from kltune.lm.model.policy import Policy
from kltune.recipe import ModelSection

HEAD = "reward_head.safetensors"
SHOWN = 400     # characters of the example at the start of a run
ROWS_PER_PAD = 256      # padded together, so that one long response does not make all of them long
PROBE_TOKENS = 16              # tokens that a saved model is tried on when it is opened again
IMPORTS = "from safetensors.torch import load_file\n"
USE = f'''head = load_file("this/folder/{HEAD}")

# ids: the tokens of prompt and response and, if the response has ended, its end token. [1, S]
hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state[0, -1].float()
score = (hidden @ head["weight"][0] + head["bias"][0]).item()
'''
FILES = ("adapter_model.safetensors", HEAD)
ADAPTER = "kltune_reward"   # its name beside the policy's; a second one gets a number


class RewardModel:
    """Scores responses; greater is better, and only differences mean something."""

    def __init__(self, policy: Policy, adapter: str = POLICY):
        """Take the adapter of that name on a policy's trunk, and a head that gives 0."""
        self.policy, self.adapter = policy, adapter
        self.head = ScalarHead(policy.network.hidden_size).to(policy.device)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the adapter's tensors (as the policy's own adapter) and the head's."""
        return self.policy.trainable_parameters() | self.head_parameters()

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's tensors by name."""
        return {f"head.{name}": tensor for name, tensor in self.head.linear.named_parameters()}

    def scores(self, ids: Tensor, last: Tensor) -> Tensor:
        """Scores of whole sequences, differentiable in adapter and head. [B] float32.

        ids: right-padded. [B, S] int64. last: True on the last token of each response, and nowhere else. [B, S] bool.
        """
        return self.policy.read(self.adapter, self.head, ids, last)

    @torch.no_grad()
    def measure(self, ids: Tensor, last: Tensor) -> Tensor:
        """``scores`` without gradients, rows in parts. [B] float32, on the CPU."""
        parts = self.policy.network.parts(ids, last)
        return parts.over(lambda place: (self.scores(*parts[place]),))[0].cpu()

    def measure_rows(self, rows: Sequence[Ids]) -> Tensor:
        """The scores of sequences of any lengths. [B] float32, on the CPU."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        scores = torch.empty(len(rows))
        for start in range(0, len(rows), ROWS_PER_PAD):
            part = order[start : start + ROWS_PER_PAD]
            scores[part] = self.measure(*self.batch([rows[index] for index in part]))
        return scores

    def batch(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Sequences as ``scores`` takes them: ids and last, [B, S] each, on the device."""
        ids = self.policy.padded(rows)
        last = torch.arange(ids.shape[1]) == torch.tensor([len(row) - 1 for row in rows])[:, None]
        return ids, last.to(self.policy.device)

    def centre(self, rows: Sequence[Ids]) -> float:
        """Shift the scores so that their mean over these sequences is 0; what was taken away, unit of score."""
        mean = self.measure_rows(rows).double().mean().item()
        self.head.linear.bias.data -= mean
        return mean

    def save(self, folder: Path) -> None:
        """Write a plain PEFT adapter, the tokenizer, the head beside them, and how to read all of it."""
        self.policy.save(folder)
        head = {name.removeprefix("head."): tensor.detach().cpu() for name, tensor in self.head_parameters().items()}
        save_file(head, folder / HEAD)
        readme = self.policy.fingerprint.how_to_load("Reward model (LoRA adapter and head)", IMPORTS, USE)
        (folder / "README.md").write_text(readme, encoding="utf-8")

    def load_trained(self, folder: Path) -> None:
        """Put back what was trained: the policy's adapter, and the head."""
        self.policy.load_adapter(folder)
        self.load_head(folder)

    def load_head(self, folder: Path) -> None:
        """Put a saved head in place; ModelError unless it is a whole one of this width."""
        path = folder / HEAD
        with reading(path, "reward", failed="cannot be read"):
            held = load_file(path)
        wanted = self.head.linear.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise ModelError(f"{path}: found {shapes}, wanted a weight of [1, {wanted['weight'].shape[1]}] and a bias.")
        if not all(torch.isfinite(tensor).all() for tensor in held.values()):
            raise ModelError(f"{path}: holds NaN or infinity.")
        self.head.linear.load_state_dict(held)

    def probe(self) -> dict[str, Any]:
        """A few tokens and their score, to be kept beside the model and tried again by ``check_probe``."""
        ids = list(range(min(PROBE_TOKENS, self.policy.network.vocabulary)))
        return {"ids": ids, "score": self.measure_rows([tuple(ids)]).item()}

    def check_probe(self, kept: dict[str, Any], folder: Path) -> None:
        """Raise ModelError unless this model gives the score that the one which was saved gave."""
        score = self.measure_rows([tuple(kept["ids"])]).item()
        if not abs(score - kept["score"]) <= AGREES[self.policy.dtype] * (1.0 + abs(kept["score"])):
            raise ModelError(
                f"{folder}: on {self.policy.fingerprint.path} it gives its probe the score {score:.6g}, but it gave "
                f"{kept['score']:.6g} when it was saved: adapter, head and base are not the ones trained together."
            )


@dataclass(frozen=True)
class RewardReader:
    """A reward model that reads responses. shared: its tokens are the policy's, because its trunk is.

    path: where it lies. templated: the rows that it learnt from went through the chat template. reads_text: text alone
    gives the tokens of such rows again.
    """

    model: RewardModel
    shared: bool
    path: str
    templated: bool
    reads_text: bool

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores of texts, each response taken to have ended."""
        return self._read_texts(prompts, responses, [True] * len(responses))

    def read(self, samples: Samples) -> list[float]:
        """Scores of sampled responses."""
        if self._reads_text(any(samples.messages)):
            return self._read_texts(samples.prompts, samples.responses, (~samples.truncated).tolist())
        places = torch.arange(samples.ids.shape[1], device=samples.ids.device)
        last = places == (samples.scored * places).amax(dim=1, keepdim=True)
        return self.model.measure(samples.ids, last).tolist()

    def example(self, prompt: Prompt) -> str:
        """A line on what is read of a prompt and its response; raises as ``read`` would."""
        text = self._reads_text(bool(prompt.messages))
        if not text:
            shown = self.model.policy.tokenizer.decode(prompt.ids, clean_up_tokenization_spaces=False) + "RESPONSE"
        else:
            shown = prompt.text + "RESPONSE"
        return example_line(self.path, "as plain text" if text else "the policy's own tokens", shown)

    def _reads_text(self, templated: bool) -> bool:
        """Whether prompts that went through the policy's chat template, or did not, are read as plain text.

        Raises:
            ModelError: neither their text nor their tokens are of the kind that it learnt from.
        """
        if not self.shared or (templated != self.templated and self.reads_text):
            return True
        if templated != self.templated:
            forms = "rows of plain text", "rows that the chat template wrote"
            raise ModelError(
                f"reward {self.path}: it learnt from {forms[self.templated]}, and the prompts here are "
                f"{forms[templated]}: its scores would mean nothing. Write data.template: "
                f"{'chat' if self.templated else 'none'} with plain rows, or train a reward model on rows like these."
            )
        return False

    def _read_texts(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> list[float]:
        policy = self.model.policy
        encoder = Encoder(policy.tokenizer, end_token=policy.ends.appended, end_ids=policy.end_ids)
        rows = zip(prompts, responses, ended, strict=True)
        return self.model.measure_rows([spelled(encoder, *row, limit=policy.max_context) for row in rows]).tolist()


def example_line(path: str, how: str, shown: str) -> str:
    """A line for the start of a run on what a reward model reads, and how."""
    cut = f"...{shown[-SHOWN:]}" if len(shown) > SHOWN else shown
    return f"reward {path}: reads {how}, as {cut!r}"


def is_reward_model(folder: Path) -> bool:
    """Whether ``kltune reward`` made what is there."""
    return (folder / HEAD).is_file()


def open_reward_model(folder: Path, policy: Policy | None, device: torch.device) -> tuple[RewardReader, str, str]:
    """Open a reward model that ``kltune reward`` saved, on a policy's trunk or with weights of its own on a device.

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
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in FILES)).hexdigest()
    facts = record["reward"]
    templated = facts.get("templated", not facts["reads_text"])     # versions before did not record it
    reader = RewardReader(model, not obstacles, str(folder), templated, facts["reads_text"])
    return reader, digest, f"reward {folder}: {note}"


def _read_record(folder: Path) -> dict[str, Any]:
    refuse_code(folder, "reward")
    record = read_json(folder / "kltune.json", ModelError, SavedModel, "reward")
    if record.get("stage") != "reward" or "reward" not in record:
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
    put_beside(policy, name, folder, "reward")
    return RewardModel(policy, name)


def _alone(folder: Path, reference: dict[str, Any], device: torch.device) -> RewardModel:
    section = ModelSection(**section_of(reference))
    own = own_tokenizer(folder)      # with the chat template that it was trained with
    policy = load_reference(
        section, device=device, where=f"reward {folder}", chat_template=None if own is None else template_of(own),
    )
    # It reads text: no message is rendered.
    if differences := policy.fingerprint.differences(reference, but=("template_sha256",)):
        raise ModelError(f"reward {folder}: its base is not the one it was trained on.\n  " + "\n  ".join(differences))
    policy.load_adapter(folder)
    for tensor in policy.trainable_parameters().values():
        tensor.requires_grad_(False)
    return RewardModel(policy)
