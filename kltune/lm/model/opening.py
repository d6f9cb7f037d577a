"""Open a policy with its reference, and try on the real model what must hold before and after training."""

import copy
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kltune.core.tensors import close
from kltune.errors import ModelError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.adapters.weights import (
    POLICY,
    Merge,
    config_to_fill,
    fill,
    keep_adapter,
    load_compatible,
    load_weights,
    merge_adapter,
    probe_ids,
    read_adapter_config,
    rewritten_base,
    trained_base,
    wrap,
)
from kltune.lm.model.batches import Rollout, pad_right
from kltune.lm.model.files import quantisation_of, reading, refuse_code
from kltune.lm.model.fingerprint import Fingerprint, probed
from kltune.lm.model.loading import (
    check_made_for,
    compute_in,
    context_of,
    empty_base,
    load_base,
    load_tokenizer,
    to_train,
)
from kltune.lm.model.network import Network
from kltune.lm.model.policy import Policy, Reference
from kltune.recipe import LoraSection, ModelSection

# Shares of the logits' size that rounding may move them by: what comes after a position, and what is beside a text. In
# narrow dtypes a token can be sent to another expert by that; an encoder's logits move by far more.
LEAK = {torch.float32: 1e-5, torch.float64: 1e-10}
MIXED = {torch.float32: 1e-4, torch.float64: 1e-8}
NARROW = 0.03
PROMPTS, TOKENS = 8, 64  # of each as many: over a large vocabulary, all of long prompts would take longer than a step
# Of a log-prob when nothing was updated yet: rounding that depends on the batch's shape. In float32 the largest change,
# in narrower dtypes the mean: of 1,500 tokens of a chat model in bfloat16 one was 0.22 nats off and their mean 0.01.
# There, lest a few wrong rows hide in the mean, no more than a share of them may be so many times as far off.
FIRST_RATIO_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
FAR, FAR_SHARE = 5.0, 0.01


def load_policy(
    section: ModelSection, lora: LoraSection | None, *, device: torch.device, chat_template: str | None = None
) -> Policy:
    """Load base and tokenizer, merge the SFT adapter if the recipe names one, and add a fresh adapter.

    Without ``lora`` every weight is trained, and a frozen second copy is the reference. chat_template: in the place of
    the tokenizer's own.

    Raises:
        ModelError: missing, not a causal LM, an adapter, a tokenizer that differs, or a base-changing SFT adapter.
    """
    section = to_train(section, device, full=lora is None)
    policy = load_reference(section, device=device, full=lora is None, chat_template=chat_template)
    if lora is not None:
        policy.add_adapter(lora)
        check_adapter(policy.network, policy.model, "lora")
    return policy


def load_reference(
    section: ModelSection, *, device: torch.device, where: str = "model.path", full: bool = False,
    chat_template: str | None = None, computed_in: str | None = None, empty: bool = False,
) -> Policy:
    """A Policy without an adapter: policy and reference are still the same weights (two copies if ``full``).

    chat_template: in the place of the tokenizer's own. computed_in: a dtype to compute in, other than that of the
    section, by which the weights are loaded and told from others. empty: shapes without weights do.
    """
    if empty:
        return empty_policy(section, None, device=device, chat_template=chat_template)
    if full:
        if section.dtype == "bfloat16":
            raise ModelError(
                "model.dtype: full fine-tuning (lora: null) needs float32; in bfloat16 small updates round to nothing."
            )
        section = section.model_copy(update={"dtype": "float32"})
    model = load_base(section, device, where)
    tokenizer = load_tokenizer(section.path, section.trust_remote_code, where)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    merge = Merge()
    if section.sft_adapter is not None:
        adapter = Path(section.sft_adapter)
        refuse_code(adapter, "model.sft_adapter", trusted=section.trust_remote_code)
        check_made_for(adapter, model, section.path)
        model, merge = merge_adapter(model, adapter) if section.merge else (keep_adapter(model, adapter), Merge())
    fingerprint = Fingerprint.of(section, model, tokenizer)
    fingerprint = replace(fingerprint, merge_survived=merge.survived, untied=merge.untied, merge_kl=merge.kl)
    if moved := computed_in not in (None, fingerprint.dtype):
        model = compute_in(model, getattr(torch, computed_in))
    trained, frozen = (copy.deepcopy(model), model) if full else (model, None)
    policy = Policy(trained, tokenizer, fingerprint, frozen=frozen)
    if section.sft_adapter is not None:
        policy.hold_against(Path(section.sft_adapter), "model.sft_adapter", section.trust_remote_code)
    check_causal(policy.network, f"{where}: {section.path}")
    ends = {name: list(ids) if isinstance(ids, tuple) else ids for name, ids in asdict(policy.ends).items()}
    probe = [] if moved else probed(probe_logits(policy))      # rounding in another dtype is no other model
    policy.fingerprint = replace(fingerprint, ends=ends, probe=probe)
    return policy


def empty_policy(
    section: ModelSection, lora: LoraSection | None, *, device: torch.device, chat_template: str | None = None
) -> Policy:
    """What ``load_policy`` would put on a device, as shapes without weights, on the meta device: to plan and to count.

    Its tokenizer is real, so that rows become tokens; raises as ``load_policy``, but for what is wrong with weights.
    """
    section = to_train(section, device, full=lora is None)
    section = section.model_copy(update={"dtype": "float32"}) if lora is None else section
    model = empty_base(section, device)
    tokenizer = load_tokenizer(section.path, section.trust_remote_code)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    fingerprint = Fingerprint(section.path, section.sft_adapter, dtype, "", "", "")
    policy = Policy(model, tokenizer, fingerprint, frozen=copy.deepcopy(model) if lora is None else None)
    if section.sft_adapter is not None:
        policy.hold_against(Path(section.sft_adapter), "model.sft_adapter", section.trust_remote_code)
    if lora is not None:
        policy.add_adapter(lora)
    return policy


def load_saved_policy(
    folder: Path, section: ModelSection, *, device: torch.device, is_adapter: bool, chat_template: str | None = None,
    computed_in: str | None = None,
) -> Policy:
    """What a folder holds over its reference (``section``): a model has weights of its own beside the reference's.

    So has an adapter that also trained parts of the base; any other lies on the reference's own weights. chat_template,
    computed_in: as for ``load_reference``.

    Raises:
        ModelError: it cannot be loaded, or is a model with another vocabulary or tokenizer than the reference.
    """
    refuse_code(folder, "checkpoint", trusted=section.trust_remote_code)
    policy = load_reference(
        section, device=device, where="reference", chat_template=chat_template, computed_in=computed_in
    )
    policy.hold_against(folder, "checkpoint", section.trust_remote_code)
    second = section.model_copy(update={"dtype": policy.fingerprint.dtype})
    if is_adapter:
        config, weights = read_adapter_config(folder), load_weights(folder)
        if rewritten_base(config) or not trained_base(config, weights, policy.model):
            return _with_adapter(policy, folder)
        trained = compute_in(load_base(second, device, "checkpoint"), policy.dtype)
        wrapped = wrap(trained, config_to_fill(folder), str(folder))
        fill(wrapped, weights, folder)  # in place
    else:
        whole = load_base(second.model_copy(update={"path": str(folder)}), device, "checkpoint")
        trained = wrapped = compute_in(whole, policy.dtype)
    saved = Policy(trained, policy.tokenizer, policy.fingerprint, frozen=policy.model)
    saved.other_tokenizers = policy.other_tokenizers
    if is_adapter:
        check_adapter(saved.network, wrapped.eval(), str(folder))
    else:
        check_causal(saved.network, str(folder))
    if saved.network.vocabulary != policy.network.vocabulary:
        raise ModelError(
            f"{folder}: it gives logits for {saved.network.vocabulary} tokens, the reference {section.path} for "
            f"{policy.network.vocabulary}: they cannot be compared."
        )
    return saved


def hold_adapter(policy: Policy, folder: Path, name: str) -> Reference | None:
    """A saved adapter on the policy's own weights as another reference; None where the two cannot lie on one trunk.

    Both are then LoRAs, each with tensors of its own: what PEFT lets lie beside one another may share some.

    Raises:
        ModelError: it cannot be loaded, or the policy is another with it there.
    """
    mine = getattr(policy.model, "peft_config", {}).get(POLICY)
    config = read_adapter_config(folder)
    if policy.full or mine is None or {mine.peft_type.value, config["peft_type"]} != {"LORA"}:
        return None
    if trained_base(config, load_weights(folder), policy.model):
        return None
    before, beside = probe_logits(policy), f"kltune_reference{len(policy.model.peft_config)}"
    weights = policy.load_beside(beside, folder)
    if not torch.equal(before, probe_logits(policy)):
        raise ModelError(f"{folder}: with this adapter beside the policy's, the policy is another; merge it into a "
                         "model (kltune merge) and give that as the reference.")
    held = policy.held
    policy.hold(Reference(policy.network, held.fingerprint.of_adapter(name, weights), beside, own=False))
    with policy.reference():
        check_adapter(policy.network, policy.model, str(folder), beside)
    reference = policy.held
    policy.hold(held)
    return reference


def hold_model(policy: Policy, other: Policy, fingerprint: Fingerprint) -> Reference:
    """Another model, as it is opened, as the reference of a policy: beside it, with weights of its own.

    Raises:
        ModelError: the two do not give logits for the same tokens, by what their ids mean.
    """
    name = fingerprint.path
    if other.network.vocabulary != policy.network.vocabulary:
        raise ModelError(
            f"--reference {name}: it gives logits for {other.network.vocabulary} tokens, the policy for "
            f"{policy.network.vocabulary}: they cannot be compared."
        )
    mine, theirs = (
        {id: token for token, id in one.tokenizer.get_vocab().items() if id < policy.network.vocabulary}
        for one in (policy, other)
    )
    moved = [id for id in sorted(mine.keys() & theirs.keys()) if mine[id] != theirs[id]]
    if moved:
        raise ModelError(
            f"--reference {name}: its tokenizer means other tokens by the same ids, {len(moved)} of them; token "
            f"{moved[0]} is {theirs[moved[0]]!r} there and {mine[moved[0]]!r} for the policy."
        )
    return Reference(other.network, fingerprint, own=False)


def _with_adapter(policy: Policy, folder: Path) -> Policy:
    """The adapter on the reference's own weights; switched off, it must leave every logit as it was."""
    before = probe_logits(policy)
    policy.load_adapter(folder)
    with policy.reference():
        after = probe_logits(policy)
    if not torch.equal(before, after):
        raise ModelError(
            f"{folder}: with this adapter off, the model is not its frozen base (a logit differs by "
            f"{(before - after).abs().max().item():.3g}); a {read_adapter_config(folder)['peft_type']} adapter of this "
            "form cannot be measured on one set of weights. Merge it into a model and give that, with --reference."
        )
    check_adapter(policy.network, policy.model, str(folder))
    policy.network.try_ways()
    return policy


def put_beside(policy: Policy, name: str, folder: Path, what: str) -> None:
    """One more saved adapter on the policy's trunk, which must not move a bit of the policy.

    Raises:
        ModelError: it does not fit, changes the base, or the policy is not as it was before.
    """
    weights, probe = load_compatible(folder, policy.model), probe_logits(policy)
    with reading(folder, what, failed=f"does not fit {policy.fingerprint.path}"):
        policy.add_beside(name, config_to_fill(folder))
    fill(policy.model, weights, folder, name)
    if not torch.equal(probe, probe_logits(policy)):
        raise ModelError(f"{what} {folder}: beside the policy's adapter it changes the policy; nothing was trained.")


@torch.no_grad()
def probe_logits(policy: Policy) -> Tensor:
    """Logits on a few tokens. [1, S, V]"""
    return policy.network.logits(policy.network.hidden(probe_ids(policy.model)))


@torch.no_grad()
def check_adapter(network: Network, wrapped: nn.Module, what: str, name: str = POLICY) -> None:
    """Raise ModelError unless an adapter that is on acts through layers alone: a causal model runs them as PEFT does.

    Some act through arguments or hooks of PEFT's own forward pass, by what they find in the whole text. ``wrapped`` is
    PEFT's model of the network's. name: of the adapter that is on.
    """
    config = wrapped.peft_config[name]
    kind = f"an adapter of type {config.peft_type.value}" + "".join(
        f" with {field.name}" for field in fields(config)
        if field.metadata.get("is_lora_variant") and getattr(config, field.name)
    )
    ids = probe_ids(network.causal, config)
    alone = "acts through PEFT's own forward pass and not through the model's layers alone"
    with reading(what, "adapter", failed=f"{kind} {alone}"):    # first: hooks can leave in layers what they need
        mine = network.logits(network.hidden(ids))
    with reading(what, "adapter", failed=f"PEFT cannot run {kind} on token ids alone"):
        theirs = wrapped(input_ids=ids, use_cache=False).logits
    if not close(mine, theirs):
        raise ModelError(
            f"{what}: {kind} {alone}, so what it does to a token can depend on those after it; kltune cannot measure "
            "or train it. Where PEFT can merge it into a model, give that."
        )
    check_causal(network, f"{what}: {kind}")


@torch.no_grad()
def check_causal(network: Network, what: str) -> None:
    """Raise ModelError unless a logit depends on the tokens before it alone: on none to come, on no other row."""
    one = probe_ids(network.causal).repeat(1, 2)[:, : context_of(network.causal)]     # longer, some angles stay others
    cut = one.shape[1] // 2
    other = torch.cat([one[:, :cut], (one[:, cut:] + 1) % network.vocabulary], dim=1)
    # Each in a pass of its own: in one batch, what is averaged over it would be the same for both.
    first, second, both = (network.logits(network.hidden(ids)).float() for ids in (one, other, torch.cat([one, other])))
    if not torch.isfinite(both).all():
        raise ModelError(f"{what}: its logits are not finite; are its files whole?")
    dtype = network.rounds_as
    # Wanted is what holds, not its contrary: NaN is above no limit.
    moved, quantised = _moved(first[:, :cut], second[:, :cut]), quantisation_of(network.causal.config)
    if quantised and not moved <= NARROW:
        raise ModelError(
            f"{what}: quantised ({quantised}), it rounds by what else is in the batch, and the logits move by "
            f"{moved:.3g} of their size with it: no number would hold. bitsandbytes in 8 bit does that where inputs of "
            "its layers are large. Give the weights as the numbers that they stand for: kltune explain references."
        )
    if not moved <= LEAK.get(dtype, NARROW):
        raise ModelError(
            f"{what} reads the tokens it is to predict: other tokens at the end move the logits before them, by "
            f"{moved:.3g} of their size. Wanted a causal language model."
        )
    if not (moved := _moved(torch.cat([first, second]), both)) <= MIXED.get(dtype, NARROW):
        raise ModelError(
            f"{what} says other things of a text beside another than of it alone, by {moved:.3g} of the logits' size; "
            "no number would hold."
        )


def _moved(before: Tensor, after: Tensor) -> float:
    """The mean change, as a share of the mean size."""
    return ((before - after).abs().mean() / before.abs().mean().clamp(min=1e-30)).item()


@torch.no_grad()
def check_fresh_policy(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Raise ModelError unless, before training, exact KL is 0 on a few prompts and two passes agree bit for bit."""
    rows = [prompt.ids[:TOKENS] for prompt in prompts[:PROMPTS] if len(prompt.ids) > 1] or [prompts[0].ids * 2]
    ids = policy.padded(rows)
    scored = pad_right([[False] + [True] * (len(row) - 1) for row in rows], False, torch.bool).to(policy.device)
    once, again = policy.measure(ids, scored), policy.measure(ids, scored, exact=False)
    if not torch.equal(once.logprobs, again.logprobs):
        raise ModelError(
            f"{policy.fingerprint.path}: two passes over the same tokens differ, so something in the model draws "
            "random numbers; every KL would be noise. Dropout is off here: look for custom code in the model."
        )
    worst = once.ref_kl.max().item()
    if worst != 0.0:
        raise ModelError(
            f"{policy.fingerprint.path}: before training, KL(policy ‖ reference) is {worst:.3g} nats at a token and "
            "not 0, so adapter-off is not the policy's own start. Likely: an adapter that is not fresh, or a layer "
            "that the adapter changes even at 0."
        )


def check_frozen(policy: Policy) -> None:
    """Raise ModelError if the reference's weights are not the ones that were fingerprinted, to the last bit."""
    now = policy.frozen_sha256()
    if now != policy.fingerprint.sha256:
        raise ModelError(
            f"The frozen weights changed during the run: sha256 {policy.fingerprint.sha256[:12]} at the start, "
            f"{now[:12]} now. Nothing measured in this run can be trusted."
        )


def check_first_ratio(logprobs: Tensor, old: Rollout, policy: Policy) -> Tensor:
    """By how much the log-probs before the first update of a step differ from the rollout's; ModelError: not rounding.

    Returned is |log π − log π_old| of each token. [N] nats.
    """
    gaps = (logprobs.detach() - old.logprobs).abs()[old.response_mask]
    expect_rounding(gaps, policy.dtype, "the rollout's")
    return gaps


def expect_rounding(gaps: Tensor, dtype: torch.dtype, whose: str) -> None:
    """Raise ModelError unless, before any update, log-probs differ from what they were by no more than rounding.

    In narrow dtypes the mean less twice its standard error is held, and how many are far off less three of theirs: a
    few tokens may be unlucky.

    Args:
        gaps: of each. [N] nats per token, 0 or above.
        dtype: of the weights.
        whose: the log-probs that they differ from.
    """
    allowed, gaps = FIRST_RATIO_GAP[dtype], gaps.double()
    if dtype == torch.float32:
        found, wrong = f"a log-probability differs by {gaps.max().item():.3g} nats", not gaps.max() <= allowed
    else:
        share, far = FAR_SHARE * len(gaps), int((gaps > FAR * allowed).sum())
        error = gaps.std(correction=0).item() / len(gaps) ** 0.5
        found = f"the average log-probability differs by {gaps.mean().item():.3g} ± {error:.2g} nats"
        wrong = not gaps.mean() - 2.0 * error <= allowed        # NaN is not above it either
        if not wrong and far > share + 3.0 * share**0.5 + 1.0:
            found, wrong = f"{far} of {len(gaps)} log-probabilities differ by more than {FAR * allowed:.3g} nats", True
    if wrong:
        raise ModelError(
            f"Before any update, {found} per token from {whose} (allowed: {allowed}): the model's output depends on "
            "the batch it is in. kltune cannot train it."
        )


def rounding_metrics(gaps: Sequence[Tensor]) -> dict[str, float]:
    """The mean and the largest of what ``check_first_ratio`` gave."""
    joined = torch.cat(list(gaps))
    return {
        "policy/first_gap_nats_per_token": joined.mean().item(), "policy/first_gap_largest_nats": joined.max().item()
    }
