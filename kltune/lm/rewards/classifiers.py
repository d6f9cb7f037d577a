"""Text classifiers of transformers as scorers: reward models with one output, and the log-odds of one label."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kltune.errors import ScorerError
from kltune.lm.model.files import check_all_read, reading, refuse_quantised
from kltune.lm.rewards.reward_model import is_reward_model
from kltune.recipe import ClassifierReward, ModelReward

ScoreFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


def load_classifier(
    entry: ModelReward | ClassifierReward, device: torch.device
) -> tuple[ScoreFunction, dict[str, str]]:
    """The scores of a sequence classifier, and its identity.

    Raises:
        ScorerError: it cannot be loaded, is no trained classifier, or does not have the output that is wanted.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    folder = Path(entry.path)
    if is_reward_model(folder / "final"):
        raise ScorerError(f"reward {entry.path}: is the folder of a run; did you mean {folder / 'final'}?")
    if (folder / "adapter_config.json").exists():  # transformers would put a random head on its base
        wanted = "write kind: model" if is_reward_model(folder) else "merge it into its base, and give that"
        raise ScorerError(f"reward {entry.path}: is an adapter, and no classifier by itself; {wanted}.")
    local = {"local_files_only": True} if folder.exists() else {}
    with reading(entry.path, "reward", ScorerError, "could not be loaded as a sequence classifier"):
        config = AutoConfig.from_pretrained(entry.path, **local)
    refuse_quantised(config, entry.path, "reward", ScorerError)
    with reading(entry.path, "reward", ScorerError, "could not be loaded as a sequence classifier"):
        tokenizer = AutoTokenizer.from_pretrained(entry.path, **local)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            entry.path, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **local,
        )
    check_all_read(model, report, entry.path, "reward", ScorerError)
    model = model.to(device).eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # decoder classifiers read the last token before padding
    choose = _chosen_logit(entry, model)
    limit = _longest(model)
    tokenizer.truncation_side = "left"  # of a long prompt and its response, the response is what is scored
    accepted = inspect.signature(model.forward).parameters  # some tokenizers give token_type_ids to models without

    @torch.no_grad()
    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [p + r if entry.input == "prompt_response" else r for p, r in zip(prompts, responses, strict=True)]
        scores: list[float] = []
        for start in range(0, len(texts), 32):
            encoded = tokenizer(
                texts[start : start + 32], padding=True, truncation=limit is not None, max_length=limit,
                return_tensors="pt",
            ).to(device)
            inputs = {name: tensor for name, tensor in encoded.items() if name in accepted}
            scores += choose(model(**inputs).logits.float()).tolist()
        return scores

    return score, {"path": entry.path}


def _longest(model: torch.nn.Module) -> int | None:
    """How many tokens a classifier reads; None: no limit is known."""
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return limit - (padding[0] + 1) if limit and padding else limit  # RoBERTa's positions start behind the padding id


def _chosen_logit(entry: ModelReward | ClassifierReward, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """From a classifier's logits [B, K] to one score per row [B]."""
    if entry.kind == "model":
        if model.config.num_labels != 1:
            raise ScorerError(
                f"reward {entry.path}: kind: model wants one output, found {model.config.num_labels} labels "
                f"({', '.join(model.config.label2id)}); use kind: classifier and name a label."
            )
        return lambda logits: logits[:, 0]
    single = model.config.num_labels == 1
    if entry.label not in model.config.label2id and not (single and entry.label is None):
        raise ScorerError(f"reward {entry.path}: no label {entry.label!r}; it has {', '.join(model.config.label2id)}.")
    if single:  # there is no other label to hold it against: the output is the log-odds itself
        return lambda logits: logits[:, 0].sigmoid() if entry.output == "probability" else logits[:, 0]
    index = model.config.label2id[entry.label]
    if entry.output == "probability":
        return lambda logits: logits.softmax(-1)[:, index]

    def log_odds(logits: Tensor) -> Tensor:
        rest = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
        return logits[:, index] - rest.logsumexp(dim=1)

    return log_odds
