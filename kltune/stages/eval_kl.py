"""How far is a checkpoint from its reference: KL(policy ‖ reference) with error bars, and a gate on it.

The headline is exact: at every position the divergence is summed over the whole vocabulary, and only the prefixes are
sampled. k1, k3 and a control variate stand beside it; that k1 agrees with it (z) shows that the text was drawn from the
very distribution that was measured, and a checkpoint where it does not is refused.
"""

import math
import sys
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from kltune.core import ranks
from kltune.core.kl.gate import looks
from kltune.core.kl.truncation import Cut
from kltune.errors import RecipeError
from kltune.lm.data.examples import Example, Prompt
from kltune.lm.measure.deployed import Deployed, measure_deployed
from kltune.lm.measure.kl_document import (
    DIRECTIONS,
    CheckpointKL,
    Gate,
    described_against,
    described_kl,
    paired_differences,
)
from kltune.lm.measure.likelihood import alignment_tax, document_nats, reference_nats
from kltune.lm.measure.measurement import Measurement, Round, against, check_agreement, measure_kl
from kltune.lm.measure.served import described_served, fit_together, measure_served
from kltune.lm.measure.server import Server, is_address
from kltune.lm.measure.transcripts import recorded
from kltune.lm.model.policy import Policy, Reference
from kltune.run.recorder import counting
from kltune.run.saved_policy import (
    MeasureOptions,
    Settings,
    Subject,
    check_budget,
    computed_on,
    find_checkpoint,
    measured_prompts,
    measured_texts,
    measured_transcripts,
    open_alone,
    open_reference,
    open_subject,
    other_dtype,
    resolve_settings,
)
from kltune.train.rollout_server import RolloutServer, server_of

VERDICT_CODES = {"fail": 3, "inconclusive": 4, "pass": 0}      # worst first


@dataclass(frozen=True)
class EvalKLOptions(MeasureOptions):
    """The command's options.

    auto: keep sampling until the gate is decided or there are ``max_responses``. top_p, top_k: also measure the policy
    as it is deployed with these. against: further references for the same responses.
    top_logprobs: tokens at each place whose log-probs a server is asked for. key_env: names the variable of its key.
    tokenizer: a model whose tokenizer and config two served ones have.
    transcripts: a file of responses that were sampled elsewhere, measured in place of fresh ones.
    """

    direction: str = "reverse"
    texts: str | None = None
    top: int = 10
    show: int = 3
    auto: bool = False
    max_responses: int = 4096
    top_p: float | None = None
    top_k: int | None = None
    against: tuple[str, ...] = ()
    top_logprobs: int = 20
    key_env: str | None = None
    tokenizer: str | None = None
    transcripts: str | None = None

    @property
    def cut(self) -> Cut | None:
        """What a deployed policy samples from, if that was asked for."""
        if self.top_p is None and self.top_k is None:
            return None
        return Cut(1.0 if self.top_p is None else self.top_p, self.top_k)


def eval_kl(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    """``kltune eval-kl``: measure checkpoints on common prompts and random numbers, and hold them against a budget.

    Args:
        checkpoints: run folders, checkpoint folders, PEFT adapters or full models.

    Returns:
        (the JSON document, the exit code: that of the worst checkpoint).

    Raises:
        RecipeError: options that make no sense. CheckpointError, ModelError, DataError: what cannot be measured.
        DivergedError: a number is not finite.
    """
    check_options(options)
    with ranks.joined("auto", ranks.TIMEOUT, "auto"):
        paths = (*checkpoints, options.reference or "", *options.against)
        if options.tokenizer or any(map(is_address, paths)):
            return ranks.from_first(lambda: eval_served(checkpoints, options))
        return _eval_kl(checkpoints, options)


def _eval_kl(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    subjects = [find_checkpoint(path, options) for path in checkpoints]
    settings = resolve_settings(subjects, options, needs_prompts=options.transcripts is None)
    documents, measured = zip(*(measure_checkpoint(subject, settings, options) for subject in subjects), strict=True)
    gates = [part["gate"] for document in documents for part in (document, *document["against"])]
    verdicts = {gate["verdict"] for gate in gates if gate is not None}
    code = next((code for name, code in VERDICT_CODES.items() if name in verdicts), 0)
    if len(documents) == 1:
        return documents[0], code
    differences = paired_differences(checkpoints, measured, options.confidence)
    return {"schema": "kltune.eval_kl_list/1", "checkpoints": list(documents), "differences": differences}, code


def check_options(options: EvalKLOptions) -> None:
    """Raise RecipeError for numbers that no measurement could be made with."""
    check_budget(options)
    if not 0.5 <= options.confidence < 1.0:
        raise RecipeError(f"--confidence: found {options.confidence}, wanted at least 0.5 and below 1, as 0.95.")
    if options.temperature is not None and not (math.isfinite(options.temperature) and options.temperature > 0.0):
        raise RecipeError(f"--temperature: found {options.temperature}, wanted a number above 0.")
    if options.top_p is not None and not 0.0 < options.top_p <= 1.0:
        raise RecipeError(f"--top-p: found {options.top_p}, wanted a probability above 0, as 0.9; 1 keeps all tokens.")
    for name in ("responses", "max_new_tokens", "top_k", "max_responses"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: found {value}, wanted at least 1.")
    if options.against and options.direction != "reverse":
        raise RecipeError("--against: holds the policy's own responses against several references; found --direction "
                          f"{options.direction}, wanted reverse.")
    if options.transcripts is not None:
        fresh = {"--auto": options.auto, "--top-p and --top-k": options.cut, "--prompts": options.prompts,
                 f"--direction {options.direction}": options.direction != "reverse"}
        if asked := [name for name, given in fresh.items() if given]:
            raise RecipeError(f"{asked[0]}: takes fresh responses, and --responses {options.transcripts} has recorded "
                              "ones; leave one of the two out.")
    if options.auto and options.max_kl is None:
        raise RecipeError("--auto: samples until a budget is decided; give the budget as --max-kl.")


def eval_served(checkpoints: list[str], options: EvalKLOptions) -> tuple[dict[str, Any], int]:
    """The same where one of the two models is served, or both: from top-k log-probs, at temperature 1."""
    path, reference = checkpoints[0], options.reference
    asked = {
        "more than one checkpoint": len(checkpoints) > 1, "--against": options.against, "--auto": options.auto,
        f"--direction {options.direction}": options.direction != "reverse", "--texts": options.texts,
        "--responses FILE": options.transcripts,
        "--top-p and --top-k": options.cut,
        f"--temperature {options.temperature}": options.temperature not in (None, 1),
    }
    if too_much := [name for name, given in asked.items() if given]:
        raise RecipeError(f"{too_much[0]}: not with a server; wanted one checkpoint, one reference and temperature 1.")
    servers = [Server(one, options.top_logprobs, options.key_env) for one in (path, reference or "") if is_address(one)]
    if reference is None or (len(servers) == 2) != (options.tokenizer is not None):
        raise RecipeError(f"{path}: wanted one served model and one that is here, whose tokenizer is used, one of them "
                          "as --reference; or two that are served, and --tokenizer MODEL.")
    if options.key_env is not None and len({one.host for one in servers}) == 2:
        raise RecipeError(f"--key-env {options.key_env}: one key for two hosts would be told to both; wanted one host.")
    served, alone = servers[0], replace(options, reference=None)
    subject = find_checkpoint(options.tokenizer or (reference if is_address(path) else path), alone)
    settings = replace(resolve_settings([subject], alone), temperature=1.0)
    local = open_alone(subject, alone, empty=len(servers) == 2)
    fit_together(servers, local)
    prompts = measured_prompts(local, settings)
    answered = Round.of(prompts, settings.responses, options.seed)
    if note := answered.drawn_note(options.seed):
        print(f"{path}: {note}", file=sys.stderr)
    with counting("asking the server", answered.responses) as progress:
        measured = measure_served(
            served, local, answered, settings.draw(options.seed), policy_is_served=is_address(path),
            reference=servers[1] if len(servers) == 2 else None, progress=progress,
        )
    gate = None
    if options.max_kl is not None:
        gate = Gate(options.max_kl, options.unit, options.confidence, 1, DIRECTIONS["reverse"], reference)
        gate.look(measured.summary("topk", gate.confidence), answered.leaves_prompts)
    document = {
        "schema": "kltune.eval_kl/1", "checkpoint": path, "own_reference": False,
        "max_new_tokens": settings.max_new_tokens, "seed": options.seed, "confidence": options.confidence,
        **described_served(measured, served, options.confidence),
        "reference": {"path": reference, "sha256": None} if is_address(reference)
        else replace(local.fingerprint, path=reference).as_dict(),
        "prompts_in_file": len(prompts), "gate": None if gate is None else gate.document(), "against": [],
    }
    for note in document["warnings"]:
        print(f"warning: {served.path}: {note}", file=sys.stderr)
    return document, 0 if gate is None else VERDICT_CODES[document["gate"]["verdict"]]


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint that is ready to be measured, on what and how."""

    path: str
    policy: Policy
    prompts: list[Prompt]
    settings: Settings
    options: EvalKLOptions
    against: tuple[Reference, ...] = ()
    recorded: Measurement | None = None
    server: RolloutServer | None = None     # that draws the policy's responses

    @property
    def first_round(self) -> Round:
        """The prompts that are answered, the same for every checkpoint and both sides."""
        return Round.of(self.prompts, self.settings.responses, self.options.seed)


def measure_checkpoint(
    subject: Subject, settings: Settings, options: EvalKLOptions
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """The document of one checkpoint; and exact KL [B] and prompt [B] of its responses, to compare it with others."""
    policy = open_subject(subject, options)
    others = tuple(open_reference(policy, subject, path, options) for path in options.against)
    if options.transcripts is None:
        server = server_of(options.recipe, settings.temperature, subject.folder.name)
        prompts = measured_prompts(policy, settings)
        opened = OpenCheckpoint(subject.path, policy, prompts, settings, options, others, server=server)
    else:
        rows = measured_transcripts(policy, settings, options.transcripts)
        read = recorded(policy, rows, settings.temperature, options.transcripts)
        prompts = [prompt for prompt, _ in rows]
        settings = replace(settings, responses=len(rows))
        opened = OpenCheckpoint(subject.path, policy, prompts, settings, options, others, read)
    if note := opened.first_round.drawn_note(options.seed):
        print(f"{subject.path}: {note}", file=sys.stderr)
    with nullcontext() if opened.server is None else closing(opened.server):
        measured = measure(opened)
    document = {
        "schema": "kltune.eval_kl/1",
        "checkpoint": subject.path,
        "own_reference": policy.held.own,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        **computed_on(policy),
        "recorded": options.transcripts,
        "sampler": None if opened.server is None else opened.server.described(),
        "template_date": None if policy.template_day is None else policy.template_day.isoformat(),
        "confidence": options.confidence,
        **described_kl(measured, policy, confidence=options.confidence, top=options.top, show=options.show),
        "against": [
            described_against(other, reference, gate, options.confidence)
            for reference, (other, gate) in zip(others, measured.against, strict=True)
        ],
        "warnings": [*other_dtype(subject, policy), *does_nothing(subject, policy, measured.reverse)],
    }
    for warning in document["warnings"][len(other_dtype(subject, policy)) :]:     # that was said when it was opened
        print(f"warning: {subject.path}: {warning}", file=sys.stderr)
    return document, (measured.reverse.exact, measured.reverse.prompt_index)


def does_nothing(subject: Subject, policy: Policy, measured: Measurement) -> list[str]:
    """What there is to say of an adapter that has tensors, and a KL of exactly 0; [] of any other."""
    trained = (subject.folder / "adapter_config.json").exists() and any(
        tensor.any() for tensor in policy.trainable_parameters().values()
    )
    if not trained or not policy.held.own or measured.exact.any():
        return []
    return [
        f"the KL is exactly 0 on all {len(measured.exact)} responses though the adapter's tensors are not all 0: it "
        "changes nothing here. Was it trained, and does it act on these prompts?"
    ]


def measure(opened: OpenCheckpoint) -> CheckpointKL:
    """All that was asked for of one policy; the gate is on the direction that was asked for."""
    options, forward = opened.options, None
    if opened.server is not None:
        opened.server.greet(opened.policy, opened.prompts)
    texts = measured_texts(opened.policy, opened.settings)
    if options.direction == "forward":
        (forward, gate), = sample_and_gate(opened, from_reference=True)
        (reverse, _), *further = sample_and_gate(opened, gated=False)
    else:
        (reverse, gate), *further = sample_and_gate(opened)
        if options.direction == "both":
            (forward, _), = sample_and_gate(opened, gated=False, from_reference=True)
    return CheckpointKL(
        reverse=reverse,
        forward=forward,
        deployed=None if options.cut is None else deploy(opened),
        tax=tax_document(opened.policy, texts, options.confidence) if texts else None,
        gate=gate,
        prompts_in_file=len(opened.prompts),
        against=tuple(further),
    )


def sample_and_gate(
    opened: OpenCheckpoint, *, gated: bool = True, from_reference: bool = False
) -> list[tuple[Measurement, dict[str, Any] | None]]:
    """Sample one side, and hold it against the budget if there is one; with ``auto``, as often as it takes.

    How often to look is fixed before the first look, and each look's interval is as much wider as that takes for all
    of them to hold together: to stop when it pleases is then no advantage. Each further reference is held against the
    budget too, on the same responses, and ``auto`` goes on until all are decided.

    Returns:
        (the measurement, the gate's part of the document or None), of the reference and of each further one.
    """
    settings, options = opened.settings, opened.options
    gated = gated and options.max_kl is not None
    counts = (settings.responses,)
    if gated and options.auto:
        counts = looks(settings.responses, options.max_responses)
    side = "the reference" if from_reference else "the policy"

    def measure_round(answered: Round) -> list[Measurement]:
        draw = settings.draw(options.seed)
        if opened.recorded is not None:
            return [opened.recorded, *(against(opened.policy, other, opened.recorded, draw.temperature)
                                       for other in opened.against)]
        with counting("sampling the reference" if from_reference else "sampling", answered.responses) as progress:
            first = measure_kl(
                opened.policy, answered, draw, progress=progress, from_reference=from_reference,
                by_token=not from_reference, respond=opened.server and opened.server.respond,
            )
        return [first, *(against(opened.policy, other, first, draw.temperature) for other in opened.against)]

    answered = Round.of(opened.prompts, counts[0], options.seed)
    measured = measure_round(answered)
    direction = DIRECTIONS["forward" if from_reference else "reverse"]
    gates = [
        Gate(options.max_kl, options.unit, options.confidence, len(counts), direction, one.fingerprint.path)
        for one in (opened.policy.held, *opened.against)
    ]
    for count in counts:
        while len(measured[0].exact) < count:
            answered = answered.following(count - len(measured[0].exact))
            measured = [sofar + more for sofar, more in zip(measured, measure_round(answered), strict=True)]
        for one in measured:
            check_agreement(opened.path, side, one.z)
        if not gated:
            return [(one, None) for one in measured]
        decided = [
            gate.look(
                one.summary("exact", gate.confidence), answered.leaves_prompts, one.noise_floor[options.unit]
            ) for gate, one in zip(gates, measured, strict=True)
        ]
        if all(decided):
            break
    return [(one, gate.document()) for gate, one in zip(gates, measured, strict=True)]


def deploy(opened: OpenCheckpoint) -> Deployed:
    """The policy as it is deployed, on responses of its own."""
    answered, draw = opened.first_round, opened.settings.draw(opened.options.seed)
    with counting("sampling the deployed policy", answered.responses) as progress:
        deployed = measure_deployed(opened.policy, answered, draw, opened.options.cut, progress)
    for name in ("vs_base", "both"):
        check_agreement(opened.path, "the deployed policy", deployed.z(name))
    return deployed


def tax_document(policy: Policy, examples: list[Example], confidence: float) -> dict[str, Any]:
    """The alignment tax on held-out texts, for the document."""
    nats, tokens = document_nats(policy, examples)
    tax = alignment_tax(nats, reference_nats(policy, examples), tokens, examples, confidence)
    return {
        "nats_per_token": tax.nats_per_token,
        "stderr": tax.token_stderr,
        "ci": tax.token_ci,
        "documents": len(tokens),
        "tokens": int(tokens.sum()),
    }
