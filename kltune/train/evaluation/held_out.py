"""What a stage measures on held-out prompts and texts while it trains, and of what it saved.

Besides the KL: scores on the reference's scale, diversity, length, entropy, the alignment tax. All of it is read off
the responses that the KL was measured on; nothing more is sampled for it.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kltune.core.hacking.diversity import distinct_stderr, diversity
from kltune.core.kl.intervals import clustered_mean, clustered_share
from kltune.core.objectives.advantages import spread
from kltune.lm.data.examples import (
    Example,
    Prompt,
    RowRules,
    counts_line,
    distinct_prompts,
    load_examples,
    load_prompts,
    prompt_ids,
    seen_note,
)
from kltune.lm.measure.breakdown import transcript
from kltune.lm.measure.likelihood import alignment_tax, document_nats, reference_nats
from kltune.lm.measure.measurement import Measurement, Round, measure_kl, measured_scores
from kltune.lm.model.batches import Rollout
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import Draw
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.scorers import Comparison, Scorer, load_comparison, load_scorer
from kltune.recipe import Recipe, SamplingSection
from kltune.run.screen import counted, doing
from kltune.run.session import Run
from kltune.train.preferences import Preferences, load_preferences, pair_metrics
from kltune.train.teacher import AnyTeacher, Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROMPTS = 8      # held-out prompts that a run's page shows before and after
EVALUATION_SEED = 2_000_003     # beyond the run's own: a gate is not to draw again what chose the policy that it judges
REDRAWN_SEED = 4_000_037        # beyond that
Scales = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Reference:
    """What evaluations hold the policy against: the reference's own answers to the same prompts, and the same texts.

    metrics: named as in the metrics, ``eval/reference_...``. scales: mean and sd of each judge's scores of its answers,
    where they have a spread. text_nats: of each held-out text, [D] nats; None without texts. answers: None without
    prompts.
    """

    metrics: Metrics
    scales: Scales
    text_nats: Tensor | None
    answers: Measurement | None


@dataclass
class HeldOut:
    """What a policy is evaluated on, and how it responds there. notes: one line on each file that was read.

    apart: there are rows besides those of training in each file that it is measured on.

    gold: a scorer that is never trained on. comparison: who prefers the policy's answers or the reference's. teacher:
    whom the policy imitates. seed: the same for every evaluation of a run, so that they are paired.
    """

    prompts: Sequence[Prompt]
    texts: Sequence[Example]
    gold: Scorer | None
    responses: int
    sampling: SamplingSection
    seed: int
    notes: tuple[str, ...] = ()
    pairs: Preferences | None = None
    apart: bool = True
    teacher: AnyTeacher | None = None
    comparison: Comparison | None = None
    _references: dict[int, Reference] = field(default_factory=dict)     # by number of responses; once per run

    @property
    def draw(self) -> Draw:
        """How responses are drawn."""
        return Draw(self.sampling.max_new_tokens, self.sampling.temperature, self.seed)

    @property
    def scored(self) -> bool:
        """See ``Evaluation``."""
        return self.gold is not None

    @property
    def judges(self) -> tuple[Judge, ...]:
        """The AI judges that an evaluation may ask."""
        comparing = None if self.comparison is None else self.comparison.judge
        return (*(() if self.gold is None else self.gold.judges), *(() if comparing is None else [comparing]))

    def measured(self, policy: Policy, scorer: Scorer | None, times: int = 1) -> tuple[Metrics, Measurement | None]:
        """KL, scores, diversity, and what becomes of texts, beside the reference's own.

        Args:
            policy: adapter on.
            scorer: the reward that is trained on; None where there is none.
            times: as many responses as usual.

        Returns:
            (metrics, the KL measurement; None without prompts, where there is no score either).
        """
        scorers = {name: scorer for name, scorer in (("score", scorer), ("gold", self.gold)) if scorer is not None}
        count = times * self.responses
        if count not in self._references:
            self._references[count] = self._reference(policy, scorers, count)
        reference = self._references[count]
        metrics: Metrics = {}
        measured = None
        if self.prompts:
            measured = self._answered(policy, count)
            kl = measured.summary()
            metrics |= {
                "eval/kl_ref_nats_per_response": kl.nats_per_response,
                "eval/kl_ref_stderr": kl.stderr,
                "eval/kl_ref_nats_per_token": kl.nats_per_token,
                "eval/prompts": kl.prompts,
                "eval/agreement_z": measured.z,
                "eval/noise_floor_nats_per_response": measured.noise_floor["nats_per_response"],
                "eval/truncated_fraction": measured.truncated.float().mean().item(),
            }
            scores = measured_scores(scorers, measured, self.sampling.missing_end_penalty)
            metrics |= score_metrics("eval/", scores, measured.prompt_index, reference.scales)
            metrics |= text_metrics("eval/", measured, policy.network.vocabulary)
            if self.comparison is not None:
                metrics |= win_metrics(self.comparison, measured, reference.answers)
            if self.teacher is not None:
                metrics |= self.teacher.held_out("eval/kl_", policy, measured, self.sampling.temperature)
        if self.texts:
            doing("evaluation: held-out texts")
            metrics |= self._tax(policy, reference)
        if self.pairs is not None:
            doing("evaluation: held-out pairs")
            metrics |= pair_metrics(policy, self.pairs)
        return metrics | reference.metrics, measured

    def _answered(self, policy: Policy, count: int, *, from_reference: bool = False) -> Measurement:
        """So many answers to the prompts, measured; with the same random numbers whoever gives them."""
        progress = counted(f"evaluation: sampling the {'reference' if from_reference else 'policy'}", count)
        # Of the reference, what is wanted has nothing to do with the policy.
        with policy.reference() if from_reference else nullcontext():
            return measure_kl(policy, self.answered(count), self.draw, progress=progress)

    def answered(self, count: int) -> Round:
        """Which prompts get so many answers; the same ones at every evaluation."""
        return Round.of(self.prompts, count, self.seed)

    def _tax(self, policy: Policy, reference: Reference) -> Metrics:
        """How well the held-out texts are predicted, and how much worse than by the reference."""
        nats, tokens = document_nats(policy, self.texts)
        tax = alignment_tax(nats, reference.text_nats, tokens, self.texts)
        mean = nats.sum() / tokens.sum()
        return {
            "eval/texts_nats_per_token": mean.item(),
            "eval/perplexity": mean.exp().item(),      # math.exp would raise, where this is infinite
            "eval/tax_nats_per_token": tax.nats_per_token,
            "eval/tax_stderr": tax.token_stderr,
        }

    def _reference(self, policy: Policy, scorers: Mapping[str, Scorer], count: int) -> Reference:
        """The same of the reference, which stays what it is."""
        metrics: Metrics = {}
        scales, text_nats, measured = {}, None, None
        if self.prompts:
            measured = self._answered(policy, count, from_reference=True)
            scores = measured_scores(scorers, measured, self.sampling.missing_end_penalty)
            scales = scales_of(scores)
            metrics |= score_metrics("eval/reference_", scores, measured.prompt_index, scales)
            metrics |= text_metrics("eval/reference_", measured, policy.network.vocabulary)
            if self.teacher is not None:
                with policy.reference():
                    metrics |= self.teacher.held_out(
                        "eval/reference_kl_", policy, measured, self.sampling.temperature
                    )
        if self.texts:
            text_nats = reference_nats(policy, self.texts)
            tokens = sum(sum(example.scored) for example in self.texts)
            metrics["eval/reference_texts_nats_per_token"] = text_nats.sum().item() / tokens
        return Reference(metrics, scales, text_nats, measured)

    def redrawn(self) -> "HeldOut":
        """The same with other random numbers, the reference's answers too."""
        return replace(self, seed=self.seed + REDRAWN_SEED, _references={})

    def against(self, trained: Preferences, source: str) -> "HeldOut":
        """The same, once the pairs that are trained on are known: those of ``source`` may be among them."""
        if self.pairs is None:
            return self
        seen, held = {row.ids for row in trained.examples}, [row.ids for row in self.pairs.examples]
        note = seen_note(source, "responses", held, seen)
        return replace(self, notes=(*self.notes, note), apart=self.apart and not seen.issuperset(held))

    def beside(self, measured: Measurement) -> Measurement:
        """What the reference answered, with the same random numbers, where the policy was measured."""
        answers = (reference.answers for reference in self._references.values())
        return next(theirs for theirs in answers if len(theirs.exact) == len(measured.exact))


def load_held_out(
    recipe: Recipe, policy: Policy, run: Run, prompts: Sequence[Prompt], rules: RowRules, note: str,
    examples: Sequence[Example] = (),
) -> HeldOut:
    """Read the recipe's ``eval`` section.

    Args:
        recipe, policy, run: of a stage that trains a policy.
        prompts: to evaluate on where the section has no prompts or pairs of its own.
        rules: what rows may be.
        note: the line on the training rows.
        examples: texts that are trained on.
    """
    section, data, tokenizer = recipe.eval, recipe.data, policy.tokenizer
    own = section.prompts or section.pairs
    texts, pairs, notes = [], None, [note]
    trained = {*(prompt.ids for prompt in prompts), *(part for row in examples for part in (row.ids, prompt_ids(row)))}
    if own is not None:
        prompts, counts = load_prompts(own, tokenizer, rules)
        prompts = prompts if section.prompts else distinct_prompts(prompts)
        notes += [counts_line(own, counts), seen_note(own, "prompts", [prompt.ids for prompt in prompts], trained)]
    if section.texts is not None:
        texts, counts = load_examples(section.texts, tokenizer, rules)
        notes += [counts_line(section.texts, counts),
                  seen_note(section.texts, "texts", [text.ids for text in texts], trained)]
    if section.pairs is not None:
        pairs, note = load_preferences(section.pairs, policy, data)
        pairs = pairs.measured(policy, range(len(pairs)), run.ref_logprobs)
        notes.append(note)
    gold = None
    if section.gold is not None:
        gold = load_scorer([section.gold], recipe.folder, policy.device, policy, run.answers)
        notes += (*gold.notes, *gold.examples(prompts))
    comparison = None
    if section.judge is not None:
        comparison = load_comparison(section.judge, recipe.folder, policy.device, policy, run.answers)
        notes.append(comparison.note)
    measured = [rows for rows in (prompts, texts) if rows]
    apart = bool(measured) and not any(trained.issuperset(row.ids for row in rows) for rows in measured)
    seed = recipe.run.seed + EVALUATION_SEED
    held_out = HeldOut(prompts, texts, gold, section.responses, recipe.sampling, seed, pairs=pairs, apart=apart,
                       comparison=comparison)
    drawn = held_out.answered(section.responses).drawn_note(recipe.run.seed) if prompts else None
    return replace(held_out, notes=(*notes, *([f"an evaluation {drawn}"] if drawn else [])))


def gold_result(metrics: Metrics) -> Metrics:
    """What result.json says of the scorer that was never trained on; None without one."""
    names = {"gold": "gold_mean", "gold_stderr": "gold_stderr", "reference_gold": "reference_gold_mean"}
    return {name: metrics.get(f"eval/{metric}") for name, metric in names.items()}


def win_metrics(comparison: Comparison, measured: Measurement, answers: Measurement) -> Metrics:
    """The share of prompts at which the policy's answers are preferred to the reference's, a tie ½, and its interval.

    Args:
        comparison: who is asked.
        measured, answers: of the policy and of the reference, with the same random numbers.
    """
    preferred = comparison.preferences(measured.rollouts, answers.rollouts)
    names = "eval/win_rate", "eval/win_rate_low", "eval/win_rate_high"
    return dict(zip(names, clustered_share(preferred, measured.prompt_index), strict=True))


def win_result(metrics: Metrics) -> dict[str, Any]:
    """What result.json says of the win rate over the reference; None without a judge."""
    rate, *ends = (metrics.get(f"eval/win_rate{end}") for end in ("", "_low", "_high"))
    return {"win_rate": rate, "win_rate_ci95": None if rate is None else ends}


def teacher_result(metrics: Metrics) -> Metrics:
    """What result.json says of the teacher; nothing without one."""
    names = {"teacher_kl": "kl_teacher_nats_per_response", "teacher_kl_stderr": "kl_teacher_stderr",
             "reference_teacher_kl": "reference_kl_teacher_nats_per_response"}
    return {name: metrics[f"eval/{metric}"] for name, metric in names.items() if f"eval/{metric}" in metrics}


def before_and_after(
    held_out: HeldOut, measured: Measurement | None, scorer: Scorer | None, tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl: the first held-out prompts of an evaluation, with what policy and reference said to each.

    measured: the evaluation; [] where there is none.
    """
    if measured is None:
        return []
    per_prompt, penalty = held_out.answered(len(measured.exact)).per_prompt, held_out.sampling.missing_end_penalty
    places = range(0, len(measured.exact), per_prompt)[:SHOWN_PROMPTS]
    after, before = (answers_at(side, places) for side in (measured, held_out.beside(measured)))
    scores, reference_scores = (scores_of(scorer, side, penalty) for side in (after, before))
    rows = [(rollout, row) for rollout in after for row in range(len(rollout.prompts))]
    said = [text for rollout in before for text in rollout.responses]
    return [
        {
            "held_out": True,
            "prompt": rollout.prompts[row],
            "response": rollout.responses[row],
            "score": scores[at],
            "ref_kl": measured.exact[places[at]].item(),
            **transcript(rollout, row, tokenizer),
            "reference_response": said[at],
            "reference_score": reference_scores[at],
        }
        for at, (rollout, row) in enumerate(rows)
    ]


def answers_at(measured: Measurement, places: Sequence[int]) -> list[Rollout]:
    """The responses at some places of all, in order and in parts."""
    parts, start = [], 0
    for rollout in measured.rollouts:
        rows = [place - start for place in places if 0 <= place - start < len(rollout.prompts)]
        parts += [rollout.select(torch.tensor(rows, device=rollout.ids.device))] if rows else []
        start += len(rollout.prompts)
    return parts


def scores_of(scorer: Scorer | None, parts: Sequence[Rollout], missing_end_penalty: float) -> list[float | None]:
    """The score of each response; None of each where nothing scores."""
    prompts, responses = ([text for rollout in parts for text in getattr(rollout, name)]
                          for name in ("prompts", "responses"))
    if scorer is None:
        return [None] * len(responses)
    truncated = torch.cat([rollout.truncated for rollout in parts])
    return scorer.total(prompts, responses, parts, truncated, missing_end_penalty).tolist()


def scales_of(scores: Mapping[str, Tensor]) -> Scales:
    """Mean and sd of each judge's scores, of those that have a spread."""
    found = {name: (row.mean().item(), spread(row)) for name, row in scores.items()}
    return {name: (mean, sd) for name, (mean, sd) in found.items() if sd > 0.0}


def score_metrics(prefix: str, scores: Mapping[str, Tensor], prompt_index: Tensor, scales: Scales) -> Metrics:
    """Mean of each judge's scores with its standard error: as they come, and in standard deviations of the reference's.

        z = (mean − mean of the reference's) / sd of the reference's,    gold_gap = score_z − gold_z

    Args:
        prefix: of the names.
        scores: of each judge, [B].
        prompt_index: which prompt a response answers. [B].
        scales: from ``scales_of`` the reference's scores; a judge without one has no z.
    """
    metrics: Metrics = {}
    for name, row in scores.items():
        mean, error = clustered_mean(row, prompt_index)
        centre, sd = scales.get(name, (None, None))
        metrics |= {
            f"{prefix}{name}_mean": mean,
            f"{prefix}{name}_stderr": error,
            f"{prefix}{name}_z": None if sd is None else (mean - centre) / sd,
            f"{prefix}{name}_z_stderr": None if sd is None or error is None else error / sd,
        }
    if "score" in scores and "gold" in scores:
        both = metrics[f"{prefix}score_z"], metrics[f"{prefix}gold_z"]
        metrics[f"{prefix}gold_gap"] = None if None in both else both[0] - both[1]
    return metrics


def text_metrics(prefix: str, measured: Measurement, vocabulary: int) -> Metrics:
    """How much the responses repeat each other, how sure they were, how long they are and whether they end."""
    said, prompts = response_tokens(measured), measured.prompt_index.tolist()
    found = diversity(said, prompts, vocabulary)
    tokens = measured.tokens.sum().item()
    return {
        f"{prefix}distinct_2_adjusted_stderr": distinct_stderr(said, prompts, vocabulary),
        f"{prefix}response_tokens_stderr": clustered_mean(measured.tokens, measured.prompt_index)[1],
        f"{prefix}distinct_1": found.distinct_1,
        f"{prefix}distinct_2": found.distinct_2,
        f"{prefix}distinct_2_adjusted": found.distinct_2_adjusted,
        f"{prefix}self_bleu": found.self_bleu,
        f"{prefix}distinct_2_per_input": found.per_input,
        f"{prefix}distinct_2_across_input": found.across_input,
        f"{prefix}duplicate_fraction": found.duplicates,
        f"{prefix}entropy_nats_per_token": measured.entropy.double().sum().item() / tokens,
        f"{prefix}response_tokens": tokens / len(measured.tokens),
        f"{prefix}end_fraction": 1.0 - measured.truncated.double().mean().item(),
    }


def response_tokens(measured: Measurement) -> list[list[int]]:
    """Each response's tokens, in order, without its end token."""
    found = []
    for rollout in measured.rollouts:
        said = (rollout.lengths - (~rollout.truncated).long()).tolist()
        rows = zip(rollout.ids.cpu(), rollout.scored.cpu(), said, strict=True)
        found += [ids[scored][:count].tolist() for ids, scored, count in rows]
    return found
