"""Open a policy with its reference: fresh for a recipe, or saved by an earlier run."""

from pathlib import Path

import torch

from kltune.errors import ModelError
from kltune.lm.adapters import merge_adapter
from kltune.lm.loading import Fingerprint, check_made_for, check_same_tokenizer, load_base, load_tokenizer
from kltune.lm.policy import Policy
from kltune.recipe import LoraSection, ModelSection


def load_policy(
    section: ModelSection, lora: LoraSection | None, *, device: torch.device, where: str = "model.path"
) -> Policy:
    """Load base and tokenizer, merge the SFT adapter if the recipe names one, and add a fresh adapter.

    Args:
        section: the recipe's ``model``.
        lora: the recipe's ``lora``; None trains every weight and keeps a frozen second copy as the reference.
        device: where the weights live.
        where: what to call the model in error messages.

    Raises:
        ModelError: missing, not a causal LM, an adapter, a tokenizer that differs, or a base-changing SFT adapter.
    """
    policy = load_reference(section, device=device, where=where, full=lora is None)
    if lora is not None:
        policy.add_adapter(lora)
    return policy


def load_reference(
    section: ModelSection, *, device: torch.device, where: str = "model.path", full: bool = False
) -> Policy:
    """A Policy without an adapter: policy and reference are still the same weights (two copies if ``full``)."""
    if full and section.dtype == "bfloat16":
        raise ModelError(
            "model.dtype: full fine-tuning (lora: null) needs float32; in bfloat16 small updates round to nothing."
        )
    if full:
        section = section.model_copy(update={"dtype": "float32"})
    model = load_base(section, device, where)
    tokenizer = load_tokenizer(section.path, section.trust_remote_code)
    survived = 1.0
    if section.sft_adapter is not None:
        check_same_tokenizer(Path(section.sft_adapter), tokenizer, what="model.sft_adapter")
        check_made_for(Path(section.sft_adapter), model, section.path)
        model, survived = merge_adapter(model, Path(section.sft_adapter))
    fingerprint = Fingerprint.of(section, model, tokenizer, merge_survived=survived)
    if not full:
        return Policy(model, tokenizer, fingerprint)
    trained = load_base(section, device, where)
    trained.load_state_dict(model.state_dict())
    return Policy(trained, tokenizer, fingerprint, frozen=model)


def load_saved_policy(folder: Path, section: ModelSection, *, device: torch.device, is_adapter: bool) -> Policy:
    """A saved adapter over its reference, or a saved full model beside it.

    Args:
        folder: where the adapter or model is.
        section: the reference.
        device: where the weights live.
        is_adapter: one set of weights and an adapter; else two sets.

    Raises:
        ModelError: it cannot be loaded, or is a model with another vocabulary or tokenizer than the reference.
    """
    if is_adapter:
        policy = load_reference(section, device=device, where="reference")
        check_same_tokenizer(folder, policy.tokenizer, what="checkpoint")
        policy.load_adapter(folder)
        return policy
    reference = load_reference(section, device=device, where="reference")
    check_same_tokenizer(folder, reference.tokenizer, what="checkpoint")
    trained = load_base(ModelSection(path=str(folder), dtype=reference.fingerprint.dtype), device, "checkpoint")
    if trained.get_input_embeddings().weight.shape != reference.model.get_input_embeddings().weight.shape:
        raise ModelError(
            f"{folder}: its vocabulary or width differs from that of {section.path}: they cannot be compared."
        )
    return Policy(trained, reference.tokenizer, reference.fingerprint, frozen=reference.model)
