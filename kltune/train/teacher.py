"""What a policy is distilled from: its logits at every token of a response, and how far the policy is from it.

    an adapter on the policy's own base     one more adapter on the one set of frozen weights
    the reference, asked in other words     the same weights, adapter off
    anything else                           weights of its own, with the same vocabulary
    a server                                log-probs of its likeliest tokens, and of those that the policy said

A teacher may read another prompt than the policy: the response that both measure is the same.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from string import Formatter
from typing import Any, ClassVar

import torch
from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.divergence import kl_k1, kl_of_distributions
from kltune.core.kl.intervals import cluster_numbers, summarize
from kltune.core.kl.topk import topk_divergence
from kltune.core.tensors import expect_finite, log_distribution
from kltune.errors import DataError, ModelError, ServerError
from kltune.lm.data.documents import SavedModel
from kltune.lm.data.encoding import Encoder
from kltune.lm.data.examples import Prompt, RowRules, fitted_prompt
from kltune.lm.data.forms import Asked
from kltune.lm.data.rows import RowFault, describe
from kltune.lm.measure.measurement import Measurement
from kltune.lm.measure.served import expect_same_words, fit_together, logprobs_of
from kltune.lm.measure.server import CannotScore, NoAnswer, Server
from kltune.lm.model.adapters.weights import POLICY, read_adapter_config, rewritten_base
from kltune.lm.model.batches import Rollout, pad_right, response_scatter
from kltune.lm.model.files import refuse_code
from kltune.lm.model.loading import own_tokenizer, pick_device, tokenizer_differences
from kltune.lm.model.opening import load_reference, load_saved_policy, put_beside
from kltune.lm.model.policy import Policy
from kltune.recipe import REFERENCE, DistillRecipe, DistillSection, ModelSection
from kltune.run.checkpoint import read_info, resolve_checkpoint

ADAPTER = "kltune_teacher"   # its name on the policy's trunk
PROBED = 32             # tokens of the whole vocabulary whose meaning a server is asked for
Metrics = dict[str, float | None]


@dataclass(frozen=True)
class Heads:
    """What a served teacher says of responses.

    tokens, logprobs: of its likeliest tokens at each place. [B, T, K] each. said: log-probabilities of the sampled
    tokens. [B, T]. outside: True where that is none of the likeliest. [B, T] bool. usual: mean of log policy/teacher
    among the likeliest, under the policy that responded. [B, T].
    """

    tokens: Tensor
    logprobs: Tensor
    said: Tensor
    outside: Tensor
    usual: Tensor

    def select(self, rows: Tensor, width: int) -> "Heads":
        """Of some rows, so many tokens of each."""
        return Heads(*(tensor[rows, :width] for tensor in vars(self).values()))

    def at(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What ``read_logprobs_and_head`` takes, of the places of responses, row after row. [N, K] twice, and [N]."""
        return self.tokens[mask], self.logprobs[mask], self.usual[mask]


@dataclass(frozen=True)
class Agreement:
    """How a policy and its teacher see the policy's own responses; [B, T] each.

    kl: KL(policy ‖ teacher) at each position, nats: exact, or, with heads, that of ``head_and_tail``. logprobs: the
    teacher's, of the sampled tokens.
    """

    kl: Tensor
    logprobs: Tensor
    heads: Heads | None = None

    def pull(self, rollout: Rollout) -> Tensor:
        """What draws the policy from its reference to the teacher: log teacher − log reference of each response. [B]"""
        return kl_k1(self.logprobs, rollout.ref_logprobs, rollout.response_mask).sum(dim=1)

    def metrics(self, rollout: Rollout) -> Metrics:
        """KL(policy ‖ teacher) of a step's responses."""
        return teacher_metrics("kl/", self.kl.double().sum(dim=1), rollout.lengths, cluster_numbers(rollout.prompts))


def teacher_metrics(prefix: str, nats: Tensor, tokens: Tensor, clusters: Tensor) -> Metrics:
    """KL(policy ‖ teacher) of some responses with its standard error; arguments as of ``summarize``."""
    kl = summarize("exact", nats, tokens, clusters)
    return {f"{prefix}teacher_nats_per_response": kl.nats_per_response, f"{prefix}teacher_stderr": kl.stderr}


@dataclass(frozen=True)
class Teacher:
    """Who is imitated. model: whose network reads. acting: within it, that network is the teacher. note: for the start
    of a run. keeps: what ``agreement`` wants of a rollout, to read nothing twice.
    """

    model: Policy
    acting: Callable[[], AbstractContextManager[None]]
    note: str
    keeps: ClassVar[tuple[str, ...]] = ("states",)

    @torch.no_grad()
    def logits_behind(self, rollout: Rollout) -> Callable[[slice], Tensor]:
        """A function that gives the teacher's logits at a slice of the response tokens, row after row. -> [n, V]"""
        ids, scored = self._sequences(rollout)
        with self.acting():
            hidden = self.model.network.before(ids, scored)

        def logits(part: slice) -> Tensor:
            with torch.no_grad(), self.acting():        # the head itself may carry an adapter
                return self.model.network.logits(hidden[part]).to(rollout.ids.device)

        return logits

    def _sequences(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """The responses behind what the teacher is asked, and which tokens they are. [B, S] each."""
        device = self.model.device
        if not any(prompt.for_teacher for prompt in rollout.asked):
            return rollout.ids.to(device), rollout.scored.to(device)
        said = [row[scored].tolist() for row, scored in zip(rollout.ids, rollout.scored, strict=True)]
        both = list(zip((list(prompt.for_teacher) for prompt in rollout.asked), said, strict=True))
        marks = [[False] * len(asked) + [True] * len(response) for asked, response in both]
        ids = self.model.padded([asked + response for asked, response in both])
        return ids, pad_right(marks, False, torch.bool).to(device)

    @torch.no_grad()
    def agreement(self, policy: Policy, rollout: Rollout, temperature: float) -> Agreement:
        """Hold responses of the policy against the teacher; within ``policy.reference()``, those of the reference.

        Raises:
            DivergedError: the teacher cannot say what the policy says.
        """
        columns: list[tuple[Tensor, Tensor]] = []
        rows = policy.network.batching.to_read(rollout.ids, rollout.scored)
        for part in rows:
            some = rollout.select(torch.tensor(part, device=rollout.ids.device))
            hidden, tokens = some.kept("states"), some.ids[some.scored]
            if hidden is None:
                hidden = policy.network.before(some.ids, some.scored)
            behind = self.logits_behind(some)
            found = []
            for start in range(0, len(hidden), policy.network.chunk_rows):
                piece = slice(start, start + policy.network.chunk_rows)
                mine, theirs = policy.network.logits(hidden[piece]), behind(piece)
                a, b = log_distribution(mine, temperature), log_distribution(theirs, temperature)
                found.append((kl_of_distributions(a, b), b.gather(-1, tokens[piece, None]).squeeze(-1)))
            flat = (torch.cat(column) for column in zip(*found, strict=True))
            width = rollout.response_mask.shape[1]
            laid_out = (response_scatter(column, some.response_mask) for column in flat)
            columns.append(tuple(
                torch.nn.functional.pad(column, (0, width - column.shape[1])) for column in laid_out
            ))
        order = torch.tensor([row for part in rows for row in part], device=rollout.ids.device).argsort()
        kl, logprobs = (torch.cat(column)[order] for column in zip(*columns, strict=True))
        expect_finite("KL(policy ‖ teacher)", kl, logprobs, advice="The teacher gives a token of the policy no chance.")
        return Agreement(kl, logprobs)

    def held_out(self, prefix: str, policy: Policy, measured: Measurement, temperature: float) -> Metrics:
        """KL(policy ‖ teacher) of the responses of a measurement."""
        kls = [self.agreement(policy, rollout, temperature).kl for rollout in measured.rollouts]
        nats = torch.cat([kl.double().sum(dim=1).cpu() for kl in kls])
        return teacher_metrics(prefix, nats, measured.tokens, measured.prompt_index)


@dataclass(frozen=True)
class ServedTeacher:
    """A teacher behind a server, which is asked what it makes of responses. note: for the start of a run."""

    server: Server
    note: str
    keeps: ClassVar[tuple[str, ...]] = ()

    def agreement(self, policy: Policy, rollout: Rollout, temperature: float = 1.0) -> Agreement:
        """As ``Teacher.agreement``, by an unbiased estimate; no temperature but 1, at which servers speak.

        Raises:
            ServerError: no answer. ModelError: an answer that cannot be right.
        """
        own, mask = rollout.ids[rollout.scored].cpu(), rollout.response_mask
        prompts = [list(prompt.ids) for prompt in rollout.asked]
        responses = [ids[scored].tolist() for ids, scored in zip(rollout.ids, rollout.scored, strict=True)]
        asked = [list(prompt.for_teacher) or ids for prompt, ids in zip(rollout.asked, prompts, strict=True)]
        told = ranks.from_first(lambda: self._asked(policy, list(zip(asked, responses, strict=True))))
        said, tokens, logprobs = (torch.tensor(column) for column in told)
        mine = logprobs_of(policy, prompts, responses, torch.cat([own[:, None], tokens], dim=1))
        inside = (tokens == own[:, None]).any(dim=1)
        found = topk_divergence(mine[:, 1:], logprobs, mine[:, 0], said, inside)
        expect_finite("KL(policy ‖ teacher)", found.kl, advice="The teacher gives a token of the policy no chance.")
        usual = torch.where(found.mass > 0.0, (found.kl - torch.where(inside, 0.0, found.k1)) / found.mass, 0.0)
        kl, *heads = (
            response_scatter(flat.to(mask.device), mask)
            for flat in (found.kl.float(), tokens, logprobs, said, ~inside, usual.float())
        )
        return Agreement(kl, heads[2], Heads(*heads))

    def _asked(self, policy: Policy, rows: Sequence[tuple[list[int], list[int]]]) -> list[list[Any]]:
        """Of each token of the responses: its log-prob, the likeliest tokens, and theirs."""
        try:
            answers = self.server.score(rows)
        except NoAnswer as error:
            raise ServerError(f"distill.teacher: {error}") from None
        expect_same_words(self.server, policy, answers)
        places = [place for answer in answers for place in answer.places]
        columns = ((place.logprob, [*place.head], [*place.head.values()]) for place in places)
        return [list(column) for column in zip(*columns, strict=True)]

    held_out = Teacher.held_out


AnyTeacher = Teacher | ServedTeacher


def load_teacher(recipe: DistillRecipe, policy: Policy) -> AnyTeacher:
    """The teacher that a recipe names.

    Raises:
        CheckpointError, ModelError: it cannot be loaded, or has another vocabulary than the policy. ServerError: it is
            served, and does not answer.
    """
    name, trusted = recipe.distill.teacher, recipe.model.trust_remote_code
    if recipe.distill.served:
        return _served(recipe.distill, policy)
    if name == REFERENCE or (name == recipe.model.path and recipe.model.sft_adapter is None):
        return Teacher(policy, policy.reference, "teacher: the policy's own frozen weights")
    folder = resolve_checkpoint(name) if Path(name).exists() else None
    if folder is None or not (folder / "adapter_config.json").exists():
        section = ModelSection(
            path=name if folder is None else str(folder), dtype=recipe.distill.teacher_dtype, trust_remote_code=trusted
        )
        model = load_reference(section, device=_device(recipe, policy), where="distill.teacher")
        return _with_own_weights(model, policy)
    refuse_code(folder, "distill.teacher", trusted=trusted)
    info = read_info(folder, SavedModel) if (folder / "kltune.json").exists() else None
    if info is not None and info.get("stage") == "reward":
        raise ModelError(f"distill.teacher: {name} is a reward model, which says nothing; wanted a policy.")
    base = _base_of(folder, info)
    if (obstacle := _obstacle(policy, folder, info, base)) is None:
        _check_vocabulary(own_tokenizer(folder, trusted), name, policy)
        put_beside(policy, ADAPTER, folder, "distill.teacher")
        return Teacher(
            policy, lambda: policy.acting_as(ADAPTER), f"teacher: {name}, one more adapter on the policy's weights"
        )
    facts = {"path": base} if info is None else {key: info["reference"][key] for key in ("path", "sft_adapter")}
    section = ModelSection(**facts, dtype=recipe.distill.teacher_dtype, trust_remote_code=trusted)
    own = load_saved_policy(folder, section, device=_device(recipe, policy), is_adapter=True)
    return _with_own_weights(own, policy, why=f" ({obstacle})")


def _served(section: DistillSection, policy: Policy) -> ServedTeacher:
    server = Server(section.teacher, section.teacher_logprobs, section.teacher_key_env)
    fit_together([server], policy)
    teacher = ServedTeacher(server, f"teacher: {server.path}, by its {server.top} likeliest tokens at each place")
    some = torch.linspace(0, len(policy.tokenizer) - 1, PROBED).long().tolist()
    try:
        ranks.from_first(lambda: teacher._asked(policy, [(some[:1], some[1:])]))
    except CannotScore:
        raise
    except ModelError as error:
        raise ModelError(f"distill.teacher: {error} (It was asked for {PROBED} tokens out of the whole vocabulary of "
                         f"{policy.fingerprint.path}, which a teacher has to share.)") from None
    return teacher


def _device(recipe: DistillRecipe, policy: Policy) -> torch.device:
    wanted = recipe.distill.teacher_device
    return policy.device if wanted == "auto" else pick_device(wanted)


def _base_of(folder: Path, info: dict[str, Any] | None) -> str:
    """The model that an adapter lies on."""
    base = info["reference"]["path"] if info else read_adapter_config(folder).get("base_model_name_or_path")
    if base is None:
        raise ModelError(
            f"distill.teacher: {folder} does not say which model it is an adapter of; merge it into one, and give that."
        )
    return base


def _obstacle(policy: Policy, folder: Path, info: dict[str, Any] | None, base: str) -> str | None:
    """Why a saved adapter cannot lie on the policy's own weights; None if it can."""
    config = read_adapter_config(folder)
    kinds = config["peft_type"], policy.model.peft_config[POLICY].peft_type.value
    if kinds != ("LORA", "LORA"):
        return f"an adapter of type {kinds[0]}"
    if rewritten_base(config) or config.get("bias", "none") != "none" or config.get("modules_to_save"):
        return "it changes its base"
    if info is not None:
        others = policy.fingerprint.differences(info["reference"], but=("template_sha256", "tokenizer_sha256"))
        return f"another base: {others[0]}" if others else None
    mine = policy.fingerprint
    same = mine.sft_adapter is None and (base == mine.path or Path(base).resolve() == Path(mine.path).resolve())
    return None if same else f"its base is {base}"


def _with_own_weights(model: Policy, policy: Policy, why: str = "") -> Teacher:
    for tensor in model.model.parameters():
        tensor.requires_grad_(False)
    name = model.fingerprint.path
    _check_vocabulary(model.tokenizer, name, policy)
    if model.network.vocabulary != policy.network.vocabulary:
        raise ModelError(
            f"distill.teacher: {name} gives logits for {model.network.vocabulary} tokens, and "
            f"{policy.fingerprint.path} for {policy.network.vocabulary}: their KL is not defined. Wanted a teacher of "
            "the same vocabulary."
        )
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.model.parameters()) / 1e6
    return Teacher(model, nullcontext, f"teacher: {name}, with weights of its own, {size:.3g} MB{why}")


def _check_vocabulary(tokenizer: Any, name: str, policy: Policy) -> None:
    """Raise ModelError unless a token is the same word to both."""
    mine = policy.tokenizer
    if tokenizer is not None and tokenizer.get_vocab() != mine.get_vocab():
        raise ModelError(
            f"distill.teacher: {name} has another vocabulary than {policy.fingerprint.path}, so their KL is not "
            f"defined:\n  {tokenizer_differences(tokenizer, mine)[0]}\nWanted a teacher with the same tokenizer."
        )


def rules_of(recipe: DistillRecipe, policy: Policy) -> RowRules:
    """What a teacher's prompt may be: as long as the context leaves beside a response."""
    return policy.row_rules(recipe.data, policy.prompt_limit(None, recipe.sampling.max_new_tokens))


def told(prompts: Sequence[Prompt], section: DistillSection, policy: Policy, rules: RowRules) -> list[Prompt]:
    """The prompts, each with what the teacher reads in its place where the recipe says so.

    rules: what rows may be; a teacher's prompt that is too long for them is an error, never cut.

    Raises:
        DataError: a row lacks a field that the template names, or the prompt is too long with it.
    """
    if section.teacher_prompt is None and section.teacher_system is None:
        return list(prompts)
    rules = replace(rules, on_overlong="error")
    encoder = rules.encoder(policy.tokenizer)
    return [_told(prompt, section, encoder, rules) for prompt in prompts]


def _told(prompt: Prompt, section: DistillSection, encoder: Encoder, rules: RowRules) -> Prompt:
    try:
        asked, _ = fitted_prompt(encoder, rules, prompt.where, _asked(prompt, section))
    except RowFault as fault:
        raise DataError(f"{prompt.where}: distill.teacher_prompt: {fault}.") from fault
    return replace(prompt, for_teacher=asked.ids)


def _asked(prompt: Prompt, section: DistillSection) -> Asked:
    """What the teacher is asked: a text, or messages where the policy is asked by messages."""
    if not prompt.messages:
        if section.teacher_system is not None:
            raise RowFault("teacher_system: the prompt is plain text, and only a chat template has a system message; "
                           "write it into teacher_prompt")
        return filled(section.teacher_prompt, {**prompt.row, "prompt": prompt.text})
    *before, last = prompt.messages
    fields = {**prompt.row, "prompt": last["content"]}
    if section.teacher_prompt is not None:
        last = last | {"content": filled(section.teacher_prompt, fields)}
    if section.teacher_system is not None:
        before = [message for message in before if message["role"] != "system"]
        before = [{"role": "system", "content": filled(section.teacher_system, fields)}, *before]
    return [*before, last]


def filled(template: str, fields: dict[str, Any]) -> str:
    """A template with the fields of a row in the place of their names in braces.

    Raises:
        RowFault: a field is missing, or is no text and no number.
    """
    parts = []
    for text, name, _, _ in Formatter().parse(template):
        parts.append(text)
        if name is None:
            continue
        if name not in fields:
            known = ", ".join(sorted(fields))
            raise RowFault(f"the row has no field {name!r}, which the template names; it has {known}")
        if not isinstance(fields[name], str | int | float):
            raise RowFault(f"field {name!r}: found {describe(fields[name])}, wanted text or a number")
        parts.append(str(fields[name]))
    return "".join(parts)
