"""The text of a first recipe: the numbers that fit a model, its data and this machine, each with its reason."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kltune.recipe import as_written

if TYPE_CHECKING:
    from kltune.lm.data.survey import Survey
SMALL = 20_000_000          # parameters: a step takes a second or so on a CPU
NATS_PER_TOKEN = 0.05       # of the target that is suggested
SAMPLED = ("ppo", "trpo")   # stages whose responses are as long as the recipe says
WHAT = {
    "sft": "Supervised fine-tuning: imitate the texts; how far that moves the model is measured.",
    "reward": "A reward model from preference pairs.",
    "ppo": "PPO: raise the score while KL(policy ‖ reference) is held to a target.",
    "trpo": "TRPO: raise the score, each step inside a KL ball, the run at a target.",
    "dpo": "DPO from preference pairs, its KL(policy ‖ reference) held to a target.",
}
Line = tuple[str, str]      # YAML, and why


@dataclass(frozen=True)
class Machine:
    """Where it will run. memory: GB that are free. parameters: of the model, by the size of its files; or None.

    narrow: the model was saved in 16 bits, and this CPU multiplies bfloat16 natively.
    """

    device: str
    memory: float
    parameters: int | None
    context: int | None
    vocabulary: int
    narrow: bool = False

    @property
    def slow(self) -> bool:
        """Whether a step of the usual size takes minutes."""
        return self.device == "cpu" and (self.parameters or 0) > SMALL

    def sequences(self, tokens: int) -> int:
        """Sequences of a step: what a quarter of the memory has room for with their logits, 8 to 64, a power of 2."""
        room = 0.25 * self.memory * 1e9 / (16 * tokens * self.vocabulary)      # float32, and three copies
        size = 8
        while size * 2 <= min(room, 16 if self.slow else 64):
            size *= 2
        return size


@dataclass(frozen=True)
class Start:
    """What a first recipe is for. plain: the tokenizer has no chat template. reward: an entry, or None.

    prompts: on which KL is measured by a stage that learns from texts.
    """

    stage: str
    model: str
    source: str
    found: "Survey"
    machine: Machine
    plain: bool
    reward: dict[str, Any] | None
    prompts: str | None

    @property
    def response(self) -> int:
        """Tokens of a response."""
        context = self.machine.context
        if self.stage not in SAMPLED:
            return rounded(quantile(self.found.response_tokens, 0.95), context and context // 2)
        usual = 48 if self.plain or self.machine.slow else 128
        return usual if context is None else min(usual, context // 2)

    @property
    def sampled(self) -> int:
        """Tokens of a response that the policy samples."""
        return min(self.response, 64 if self.machine.device == "cpu" else 128) if self.stage not in SAMPLED else (
            self.response)

    @property
    def batch(self) -> int:
        """Rows of a step; a pair is two."""
        size = self.machine.sequences(self.prompt + self.response)
        return max(8, min(size, 32) // 2) if self.stage in ("dpo", "reward") else min(size, 32)

    @property
    def prompt(self) -> int:
        """Tokens of a prompt."""
        context = self.machine.context
        return rounded(quantile(self.found.prompt_tokens, 0.99), context and context - self.response)

    def text(self, folder: Path) -> str:
        """The recipe, for a folder that it will lie in."""
        parts = [*model_lines(self), *data_lines(self, folder), *response_lines(self), *budget_lines(self),
                 *length_lines(self, folder)]
        head = [
            f"# {WHAT[self.stage]}",
            f"#     kltune recipe check {self.stage}.yaml     every fault at once; kltune explain KEY: a key's meaning",
            f"#     kltune {self.stage} {self.stage}.yaml", "#",
            f"# Written by kltune init for {self.found.rows} rows, on a {self.machine.device} with "
            f"{self.machine.memory:.0f} GB free.",
        ]
        return "\n".join([*head, *(f"{text:<48}  # {why}" if why else text for text, why in parts)]) + "\n"


def model_lines(start: Start) -> Iterator[Line]:
    """Which weights, and what is trained beside them."""
    yield f"stage: {start.stage}", ""
    yield "model:", ""
    yield f"  path: {as_written(start.model)}", ""
    if start.machine.narrow:
        yield "  dtype: bfloat16", "as it was saved; this CPU multiplies it faster than float32"
    yield "lora: {rank: 16, alpha: 32}", "the adapter; switched off it leaves the reference"


def data_lines(start: Start, folder: Path) -> Iterator[Line]:
    """The rows: their file, columns, template and lengths."""
    found = start.found
    yield "data:", ""
    yield f"  {found.kind}: {as_written(relative(start.source, folder))}", f"{found.rows} rows"
    if found.columns:
        names = ", ".join(f"{ours}: {as_written(theirs)}" for ours, theirs in found.columns.items())
        yield f"  columns: {{{names}}}", "our names, and the file's"
    chat = found.template == "chat"
    yield f"  template: {found.template}", (
        "a prompt is a message of the user in the chat template" if chat else "the chat template if rows are messages")
    if found.messages and start.plain:
        yield "  chat_template: chat.jinja", "the tokenizer has none"
    if found.faults:
        yield "  on_bad_row: skip", f"{len(found.faults)} are faulty, as {found.faults[0].partition(': ')[0]}"
    if found.form != ("text",):
        yield f"  max_prompt_tokens: {start.prompt}", "99 % of the prompts have no more"
    if start.stage not in SAMPLED:
        yield f"  max_response_tokens: {start.response}", "95 % of the responses have no more"


def response_lines(start: Start) -> Iterator[Line]:
    """What the policy samples, and who scores it."""
    if start.stage == "reward":
        return
    size = start.machine.sequences(start.prompt + start.sampled)
    yield "sampling:", ""
    if start.stage in SAMPLED:
        yield f"  prompts_per_step: {size // 2 if start.stage == 'ppo' else size}", "as many as the memory has room for"
        yield "  responses_per_prompt: 2", "each is held against the other"
    elif start.stage == "dpo":
        yield f"  prompts_per_step: {min(size, 32)}", "answered at every step, to measure the KL"
    yield f"  max_new_tokens: {start.sampled}", "a response is cut there"
    if start.reward is not None:
        yield "reward:", ""
        entry = ", ".join(f"{key}: {as_written(value)}" for key, value in start.reward.items())
        yield f"  - {{{entry}}}", "one or more; the score is their weighted sum"


def budget_lines(start: Start) -> Iterator[Line]:
    """The KL that is held, and the stage's own section."""
    if start.stage in ("sft", "reward"):
        return
    target = max(2, round(NATS_PER_TOKEN * start.sampled))
    yield "kl:", ""
    yield "  control: target", ""
    yield f"  target: {target}", "nats per response: how far from the reference; higher is further"
    if start.stage == "ppo":
        yield f"ppo: {{baseline: rloo, epochs: {1 if start.machine.slow else 2}}}", "passes over a step's responses"
    elif start.stage == "trpo":
        yield "trpo:", ""
        yield "  baseline: rloo", ""
        yield "  max_step_kl: 0.2", "nats per response; no step moves the policy further"
    else:
        yield "dpo:", ""
        yield "  beta: 0.1", "of the loss; it bounds no KL"


def length_lines(start: Start, folder: Path) -> Iterator[Line]:
    """How fast, how long, and what is measured."""
    machine, stage = start.machine, start.stage
    small = machine.parameters is not None and machine.parameters < SMALL
    rate = {"sft": 5e-4, "reward": 5e-4, "dpo": 2e-4}.get(stage, 3e-4) * (2 if small else 1)
    steps = 20 if machine.slow else 60 if machine.device == "cpu" else 100
    if stage != "trpo":
        yield "optim:", ""
        yield f"  lr: {rate:g}", "at most; steps are shortened to hold the KL" if stage == "ppo" else "falls to 0"
    if stage not in SAMPLED:
        yield f"  batch_size: {start.batch}", "rows of a step"
    yield "run:", ""
    yield f"  steps: {steps}", "few, as this is a CPU" if machine.slow else "more where the result still improves"
    yield f"  eval_every: {max(5, steps // 4)}", ""
    yield f"  output: runs/{stage}", ""
    if stage == "reward":
        return
    yield "eval:", ""
    if stage == "sft" and start.prompts is not None:
        yield f"  prompts: {as_written(relative(start.prompts, folder))}", "better: prompts that are not trained on"
    elif stage != "sft":
        yield "  # prompts: held_out.jsonl", "without them, all is measured on prompts of training"
    yield f"  responses: {32 if machine.slow else 128}", "of a measurement; its error falls with their root"


def quantile(values: Sequence[int], share: float) -> int:
    """The value that a share of the others does not pass; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0


def rounded(tokens: int, most: int | None) -> int:
    """A number of tokens as a multiple of 8, at least 8, and no more than there is room for."""
    up = max(8, -(-tokens // 8) * 8)
    return up if most is None else max(8, min(up, most))


def relative(source: str, folder: Path) -> str:
    """A path from a recipe's folder if it lies in there, else as it is."""
    home = folder.absolute()
    return os.path.relpath(source, home) if Path(source).is_absolute() and Path(source).is_relative_to(home) else source
