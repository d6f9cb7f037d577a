"""What does a checkpoint say, and what did its reference: side by side, same random numbers, with the KL of each.

``kltune compare`` has a judge say which of two it prefers, and counts.

Two models that are given the same random numbers say the same as far as they agree; where they part, and how far apart
they are at every token, is what a number like 6 nats per response looks like.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kltune.core.kl.intervals import clustered_share
from kltune.errors import DataError, RecipeError
from kltune.lm.data.examples import Prompt, load_prompts
from kltune.lm.data.forms import PROMPT_FORMS, FormOfFile, prompt_of
from kltune.lm.data.rows import Row, read_rows
from kltune.lm.measure.breakdown import transcript
from kltune.lm.measure.measurement import Measurement, Round, answer_both
from kltune.lm.model.batches import Samples
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample as draw_responses
from kltune.lm.rewards.scorers import load_comparison, name_of
from kltune.recipe import REFERENCE, RewardEntry
from kltune.run.saved_policy import (
    MeasureOptions,
    Settings,
    computed_on,
    find_checkpoint,
    measured_prompts,
    open_subject,
    resolve_settings,
    row_rules,
)
from kltune.run.screen import doing

SIDE_DIRECTIONS = {"policy": "KL(policy||reference)", "reference": "KL(reference||policy)"}


@dataclass(frozen=True)
class SampleOptions(MeasureOptions):
    """The command's options. per_prompt: responses to each prompt. template: of prompts that are typed."""

    per_prompt: int = 1
    template: str | None = None


@dataclass(frozen=True)
class Speaker:
    """A checkpoint that waits to be asked."""

    path: str
    policy: Policy
    settings: Settings
    options: SampleOptions

    def answer(self, texts: Sequence[str], turn: int = 0) -> list[dict[str, Any]]:
        """What policy and reference say to prompts that were typed, or, if none were, to those of ``--prompts``.

        Each ``turn`` of a conversation has random numbers of its own.
        """
        policy, settings, per_prompt = self.policy, self.settings, self.options.per_prompt
        prompts = typed_prompts(policy, settings, texts) if texts else measured_prompts(policy, settings)
        doing("sampling policy and reference")
        answered = Round(prompts, 0, len(prompts), per_prompt, number=turn)
        sides = answer_both(policy, answered, settings.draw(self.options.seed))
        spoken = [shown_responses(side, policy) for side in sides]
        pairs = [{"policy": after, "reference": before} for after, before in zip(*spoken, strict=True)]
        return [
            {"prompt": prompt.text, "responses": pairs[place * per_prompt : (place + 1) * per_prompt]}
            for place, prompt in enumerate(prompts)
        ]

    def document(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        """The JSON document of some answers."""
        return {
            "schema": "kltune.sample/1",
            "checkpoint": self.path,
            "own_reference": self.policy.held.own,
            "reference": self.policy.fingerprint.as_dict(),
            "direction": SIDE_DIRECTIONS,
            "template": self.settings.data.template,
            "temperature": self.settings.temperature,
            "max_new_tokens": self.settings.max_new_tokens,
            "seed": self.options.seed,
            **computed_on(self.policy),
            "prompts": prompts,
        }


def open_speaker(checkpoint: str, options: SampleOptions) -> Speaker:
    """Find a checkpoint and open it over its reference, as ``eval-kl`` does."""
    subject = find_checkpoint(checkpoint, options)
    settings = resolve_settings([subject], options, needs_prompts=False)
    policy = open_subject(subject, options)
    if options.prompts is None or options.template is not None:
        template = options.template or template_of_typed(policy, settings)
        settings = replace(settings, data=settings.data.model_copy(update={"template": template}))
    return Speaker(subject.path, policy, settings, options)


@dataclass(frozen=True)
class CompareOptions(MeasureOptions):
    """The command's options. judge: who prefers one of two responses, or scores them."""

    judge: RewardEntry | None = None


def compare(first: str, second: str, options: CompareOptions) -> dict[str, Any]:
    """``kltune compare``: how often a judge prefers the answers of one checkpoint to another's, or its reference's.

    Both answer the same prompts with the same random numbers. A judge is asked in both orders; contradicting itself is
    a tie, as are equal answers, of which nobody is asked. A scorer prefers the higher score.

    Returns:
        The JSON document; the interval of the win rate, in which a tie counts half, is by prompt.

    Raises:
        RecipeError: no prompts are known. CheckpointError, ModelError, DataError, ScorerError, JudgeError.
    """
    names = [first] if second == REFERENCE else [first, second]
    subjects = [find_checkpoint(name, options) for name in names]
    settings = resolve_settings(subjects, options)
    policy = open_subject(subjects[0], options)
    mine, clusters = answers(policy, settings, options.seed)
    if second == REFERENCE:
        with policy.reference():
            theirs, _ = answers(policy, settings, options.seed)
    else:
        theirs, _ = answers(open_subject(subjects[1], options), settings, options.seed)
    if [text for part in mine for text in part.prompts] != [text for part in theirs for text in part.prompts]:
        raise DataError(f"{settings.prompts}: {first} and {second} keep other rows of it: their answers do not pair.")
    judge = load_comparison(options.judge, Path.cwd(), policy.device, policy)
    print(judge.note, end="\n" if judge.note else "", file=sys.stderr)
    preferred = judge.preferences(mine, theirs)
    rate, low, high = clustered_share(preferred, clusters, options.confidence)
    return {
        "schema": "kltune.compare/1",
        "first": {"checkpoint": first, "tokens": mean_tokens(mine)},
        "second": {"checkpoint": second, "tokens": mean_tokens(theirs)},
        "reference": policy.fingerprint.as_dict(),
        "judge": name_of(options.judge),
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": options.seed,
        "prompts": clusters.unique().numel(),
        "pairs": len(preferred),
        "wins": int((preferred > 0.5).sum()),
        "ties": int((preferred == 0.5).sum()),
        "losses": int((preferred < 0.5).sum()),
        "win_rate": rate,
        "confidence": options.confidence,
        "ci": (low, high),
    }


def answers(policy: Policy, settings: Settings, seed: int) -> tuple[list[Samples], Tensor]:
    """What the policy as it is says to the prompts, in parts, and which prompt each response answers. [B]"""
    answered = Round.of(measured_prompts(policy, settings), settings.responses, seed)
    if note := answered.drawn_note(seed):
        print(f"a checkpoint {note}", file=sys.stderr)
    parts = answered.parts(settings.draw(seed))
    said = [draw_responses(policy, some, numbers, temperature=settings.temperature) for some, numbers, _ in parts]
    return said, answered.prompt_index()


def mean_tokens(said: list[Samples]) -> float:
    """Tokens of a response, end token included."""
    return torch.cat([part.lengths for part in said]).double().mean().item()


def typed_prompts(policy: Policy, settings: Settings, texts: Sequence[str]) -> list[Prompt]:
    """Prompts that were typed, treated like those of a file of ``{"prompt"}``, but that none is dropped: what is cut is
    said on stderr. Raises as ``load_prompts``.
    """
    rows = [Row(f"prompt {place}", {"prompt": text}) for place, text in enumerate(texts, start=1)]
    rules = row_rules(policy, settings)
    rules = replace(rules, on_overlong="truncate" if rules.on_overlong == "drop" else rules.on_overlong)
    prompts, counts = load_prompts("the prompts given", policy.tokenizer, rules, rows)
    if counts.truncated:
        print(
            f"note: of {counts.truncated} of {len(prompts)} prompts only the last {rules.max_prompt_tokens} tokens are "
            "read: that is what the policy was trained to read (data.max_prompt_tokens), or what the model's context "
            "leaves beside --max-new-tokens.", file=sys.stderr,
        )
    return prompts


def template_of_typed(policy: Policy, settings: Settings) -> str:
    """How a prompt that is typed becomes what the policy was trained on.

    As the prompts of its run did; where they are not at hand, with the chat template if the tokenizer has one.
    """
    if settings.data.template != "auto":
        return settings.data.template
    messages = bool(policy.tokenizer.chat_template)
    if settings.prompts is not None and os.path.isfile(settings.prompts):
        rules = policy.row_rules(settings.data, 1)
        fields = rules.layout(rules.encoder(policy.tokenizer)).first(read_rows(settings.prompts))
        if fields:
            messages = not isinstance(prompt_of(fields, FormOfFile(PROMPT_FORMS).of(fields)), str)
    elif messages:
        print("note: prompts go through the chat template; --template none gives them as they are.", file=sys.stderr)
    return "chat" if messages else "none"


def shown_responses(measured: Measurement, policy: Policy) -> list[dict[str, Any]]:
    """Each response of one side with its KL, nats, and token by token."""
    nats = iter(measured.exact.tolist())
    return [
        {
            "response": rollout.responses[row],
            "kl": next(nats),
            "truncated": bool(rollout.truncated[row]),
            **transcript(rollout, row, policy.tokenizer),
        }
        for rollout in measured.rollouts for row in range(len(rollout.ids))
    ]


def sample(checkpoint: str, texts: Sequence[str], options: SampleOptions) -> dict[str, Any]:
    """``kltune sample``: the answers to prompts that were given, or to those of ``--prompts``.

    Raises:
        RecipeError: there is no prompt, or there are two sources of them. CheckpointError, ModelError, DataError: what
            cannot be answered. DivergedError: a number is not finite.
    """
    if texts and options.prompts is not None:
        raise RecipeError("--prompt and --prompts: found both, wanted one of them.")
    if not texts and options.prompts is None:
        raise RecipeError("no prompt: give --prompt TEXT or --prompts FILE, or write one prompt a line on stdin.")
    speaker = open_speaker(checkpoint, options)
    return speaker.document(speaker.answer(texts))
