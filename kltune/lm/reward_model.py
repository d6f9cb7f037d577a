"""A reward model: an adapter on the frozen trunk, and a head that reads the last token of a response.

While it is trained, its adapter is the policy's own (a reward model is not sampled from). Afterwards the same adapter
can lie beside a policy's on one trunk: policy, reference, value function and reward model are then one set of weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kltune.errors import ModelError
from kltune.lm.adapters import POLICY
from kltune.lm.batches import pad_right
from kltune.lm.encoding import Ids
from kltune.lm.heads import ScalarHead
from kltune.lm.policy import Policy

HEAD = "reward_head.safetensors"
ROWS_PER_PAD = 256      # padded together, so that one long response does not make all of them long
PROBE = 16              # tokens that a saved model is tried on when it is opened again
AGREES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}      # of 1 + |score|, on another machine
IMPORTS = "from safetensors.torch import load_file\n"
USE = f'''head = load_file("this/folder/{HEAD}")

# ids: the tokens of prompt and response and, if the response has ended, its end token. [1, S]
hidden = model.get_base_model().base_model(input_ids=ids).last_hidden_state[0, -1].float()
score = (hidden @ head["weight"][0] + head["bias"][0]).item()
'''


class RewardModel:
    """Scores responses; greater is better, and only differences mean something."""

    def __init__(self, policy: Policy, adapter: str = POLICY):
        """Take the adapter of that name on a policy's trunk, and a head that gives 0."""
        self.policy, self.adapter = policy, adapter
        self.head = ScalarHead(policy.network.hidden_size).to(policy.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: the adapter's tensors (as the policy's own adapter) and the head's."""
        return self.policy.trainable_parameters() | self.head_parameters()

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's tensors by name."""
        return {f"head.{name}": tensor for name, tensor in self.head.linear.named_parameters()}

    def scores(self, ids: Tensor, last: Tensor) -> Tensor:
        """Scores of whole sequences, differentiable in adapter and head.

        Args:
            ids: right-padded prompts with their responses. [B, S] int64.
            last: True on the last token of each response, and nowhere else. [B, S] bool.

        Returns:
            [B] float32.
        """
        return self.policy.read(self.adapter, self.head, ids, last)

    @torch.no_grad()
    def measure(self, ids: Tensor, last: Tensor) -> Tensor:
        """``scores`` without gradients, rows in parts. [B] float32, on the CPU."""
        parts = self.policy.network.parts(ids, last)
        return parts.in_order(torch.cat([self.scores(*part) for part in parts])).cpu()

    def measure_rows(self, rows: Sequence[Ids]) -> Tensor:
        """The scores of sequences of any lengths. [B] float32, on the CPU."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        found = torch.empty(len(rows))
        for start in range(0, len(rows), ROWS_PER_PAD):
            part = order[start : start + ROWS_PER_PAD]
            found[part] = self.measure(*self.batch([rows[index] for index in part]))
        return found

    def batch(self, rows: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Sequences as ``scores`` takes them: ids and last, [B, S] each, on the device."""
        ids = pad_right(rows, self.policy.tokenizer.pad_token_id)
        last = torch.arange(ids.shape[1]) == torch.tensor([len(row) - 1 for row in rows])[:, None]
        return ids.to(self.policy.device), last.to(self.policy.device)

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

    def load_head(self, folder: Path) -> None:
        """Put a saved head in place.

        Raises:
            ModelError: its file is missing, damaged, not finite, or of another width than this trunk.
        """
        path = folder / HEAD
        try:
            held = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: cannot be read ({error}).") from None
        wanted = self.head.linear.state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in held.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in wanted.items()}:
            raise ModelError(f"{path}: found {shapes}, wanted a weight of [1, {wanted['weight'].shape[1]}] and a bias.")
        if not all(torch.isfinite(tensor).all() for tensor in held.values()):
            raise ModelError(f"{path}: holds NaN or infinity.")
        self.head.linear.load_state_dict(held)

    def probe(self) -> dict[str, Any]:
        """A few tokens and their score, to be kept beside the model and tried again by ``check_probe``."""
        ids = list(range(min(PROBE, self.policy.network.vocabulary)))
        return {"ids": ids, "score": self.measure_rows([tuple(ids)]).item()}

    def check_probe(self, kept: dict[str, Any], folder: Path) -> None:
        """This model gives the score that the one which was saved gave.

        Raises:
            ModelError: it does not, so adapter, head and trunk are not those that were trained together.
        """
        found = self.measure_rows([tuple(kept["ids"])]).item()
        if not abs(found - kept["score"]) <= AGREES[self.policy.dtype] * (1.0 + abs(kept["score"])):
            raise ModelError(
                f"{folder}: on {self.policy.fingerprint.path} it gives its probe the score {found:.6g}, but it gave "
                f"{kept['score']:.6g} when it was saved: adapter, head and base are not the ones trained together."
            )
