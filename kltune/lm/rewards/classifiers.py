"""Text classifiers of transformers as scorers: reward models with one output, and the log-odds of one label."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from kltune.errors import ScorerError
from kltune.lm.data.chat import without_template
from kltune.lm.data.encoding import Encoder, Ids, last_tokens
from kltune.lm.data.examples import Prompt
from kltune.lm.data.forms import Message
from kltune.lm.data.rows import RowFault
from kltune.lm.model.batches import Samples, pad_right
from kltune.lm.model.files import check_all_read, reading, refuse_code, refuse_oversized, refuse_quantised
from kltune.lm.model.loading import as_in_file
from kltune.lm.rewards.reward_model import example_line, is_reward_model
from kltune.recipe import ClassifierReward, ModelReward

ScoreFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
ROWS = 32       # that are read at once
REGRESSION, MULTI_LABEL = "regression", "multi_label_classification"     # problem_type of a configuration
ALONE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}     # of 1 + |score|: rounding in a batch


class Classifier:
    """A sequence classifier that reads a conversation in its own chat template and tokens, or plain text.

    A row's score is that of the row alone, whatever else is read with it.
    """

    def __init__(self, entry: ModelReward | ClassifierReward, model: nn.Module, tokenizer, day: date | None = None):
        """Take a loaded classifier and its tokenizer. day: what its template is told that asks for the date.

        Raises:
            ScorerError: it does not have the output, or the chat template, that the entry wants.
        """
        self.entry, self.model, self.tokenizer = entry, model, tokenizer
        self._choose = _chosen_logit(entry, model)
        _widen_head(model)
        self._limit = _longest(model)
        self._encoder = Encoder(tokenizer, "chat", day=day)
        self._accepted = inspect.signature(model.forward).parameters  # not all know the token types that some are given
        if entry.template == "chat" and not self._encoder.chat.source:
            raise ScorerError(
                f"reward {entry.path}: template: chat, but its tokenizer {without_template(tokenizer)}; write none."
            )
        tokenizer.truncation_side = "left"  # of a long prompt and its response, the response is what is scored
        self._named_padding = model.config.get_text_config().pad_token_id
        self._pads = self._padding_changes_nothing()

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        """Scores of responses to prompts that are plain text."""
        return self._scores(prompts, responses, [()] * len(prompts))

    def read(self, samples: Samples) -> list[float]:
        """Scores of sampled responses."""
        return self._scores(samples.prompts, samples.responses, samples.messages or [()] * len(samples.prompts))

    def example(self, prompt: Prompt) -> str:
        """A line on what is read of a prompt and its response."""
        chat = self._reads_chat(prompt.messages)
        ids = self._row(prompt.text, "RESPONSE", prompt.messages)
        shown = self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        how = "in its own chat template" if chat else "as plain text"
        how += "" if self._pads else ", rows of one length at a time, because padding would change its scores"
        return example_line(self.entry.path, how, shown)

    def _reads_chat(self, messages: Sequence[Message]) -> bool:
        if self.entry.input == "response" or self.entry.template == "none":
            return False
        return self.entry.template == "chat" or (bool(messages) and bool(self._encoder.chat.source))

    def _row(self, prompt: str, response: str, messages: Sequence[Message]) -> Ids:
        """The tokens of a prompt and its response, or of the response alone."""
        if self._reads_chat(messages):
            asked = messages or [{"role": "user", "content": prompt}]
            try:
                ids = self._encoder.chat_ids([*asked, {"role": "assistant", "content": response}], to_answer=False)
            except RowFault as fault:
                raise ScorerError(f"reward {self.entry.path}: prompt {prompt[-60:]!r}: {fault}") from None
            return ids if self._limit is None else last_tokens(ids, self._limit, self.tokenizer.bos_token_id)
        between = "\n\n" if messages else ""
        text = prompt + between + response if self.entry.input == "prompt_response" else response
        cut = {"truncation": True, "max_length": self._limit} if self._limit is not None else {}
        ids, head = tuple(self.tokenizer(text, **cut)["input_ids"]), self._encoder.head
        if head and ids[: 2 * len(head)] == head * 2:     # a prompt that a template was applied to spells it already
            ids = ids[len(head) :]
        if not ids:
            raise ScorerError(f"reward {self.entry.path}: its tokenizer makes no token of {text[:60]!r}.")
        return ids

    def _scores(
        self, prompts: Sequence[str], responses: Sequence[str], messages: Sequence[Sequence[Message]]
    ) -> list[float]:
        rows = [self._row(*row) for row in zip(prompts, responses, messages, strict=True)]
        scores = torch.empty(len(rows))
        for places in self._batches(rows):
            scores[places] = self._choose(self._logits([rows[place] for place in places]).float()).cpu()
        return scores.tolist()

    def _batches(self, rows: Sequence[Ids]) -> Iterator[list[int]]:
        """Places of rows that are read together: of similar length, or of one length where padding is not harmless."""
        order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
        for _, alike in groupby(order, key=lambda place: 0 if self._pads else len(rows[place])):
            places = list(alike)
            yield from (places[start : start + ROWS] for start in range(0, len(places), ROWS))

    @torch.no_grad()
    def _logits(self, rows: Sequence[Ids]) -> Tensor:
        """Logits of rows, padded on the right. [B, K]"""
        ids = pad_right(rows, self._padding(rows)).to(self.model.device)
        inputs = {"input_ids": ids}
        if "attention_mask" in self._accepted:
            inputs["attention_mask"] = pad_right([[1] * len(row) for row in rows], 0).to(self.model.device)
        return self.model(**inputs).logits

    def _padding(self, rows: Sequence[Ids]) -> int:
        """What rows are padded with: the id that the model's configuration names, by which decoders find a row's end.

        Where it names none, or one without an embedding, a row alone is read to its last token: so it is in a batch if
        the configuration names an id that no row has.
        """
        table = self.model.get_input_embeddings().num_embeddings
        named = self._named_padding
        if named is not None and 0 <= named < table:
            return named
        used = {token for row in rows for token in row}
        free = next((token for token in range(table) if token not in used), 0)
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = free
        return free

    @torch.no_grad()
    def _padding_changes_nothing(self) -> bool:
        """Whether a short row that is read beside a long one has the score that transformers gives it alone."""
        short, long = (self._row(text, text, ()) for text in ("a", "a b c d e f g"))
        alone = self._choose(self.model(input_ids=torch.tensor([short], device=self.model.device)).logits.float())
        try:
            beside = self._choose(self._logits([short, long]).float())[:1]
        except ValueError:      # a model that cannot find the end of a padded row says so
            return False
        allowed = ALONE.get(self.model.dtype, ALONE[torch.bfloat16]) * (1.0 + alone.abs())
        return len(short) < len(long) and bool(((beside - alone).abs() <= allowed).all())


def load_classifier(
    entry: ModelReward | ClassifierReward, device: torch.device, day: date | None = None
) -> Classifier:
    """A sequence classifier that transformers can load. day: what its chat template is told that asks for the date.

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
    refuse_code(folder, "reward", ScorerError)
    local = {"local_files_only": True, "trust_remote_code": False} if folder.exists() else {"trust_remote_code": False}
    precise = {"dtype": torch.float32} if device.type == "cpu" else {}
    with reading(entry.path, "reward", ScorerError, "could not be loaded as a sequence classifier"):
        config = AutoConfig.from_pretrained(entry.path, **local)
    refuse_quantised(config, entry.path, "reward", ScorerError)
    refuse_oversized(config, entry.path, "reward", ScorerError, AutoModelForSequenceClassification.from_config)
    for part in (config, config.get_text_config()):
        if (getattr(part, "pad_token_id", None) or 0) >= getattr(part, "vocab_size", math.inf):
            part.pad_token_id = None        # no embedding can be made with it
    with reading(entry.path, "reward", ScorerError, "could not be loaded as a sequence classifier"):
        tokenizer = as_in_file(AutoTokenizer.from_pretrained(entry.path, **local), entry.path)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            entry.path, config=config, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **precise, **local,
        )
    check_all_read(model, report, entry.path, "reward", ScorerError)
    return Classifier(entry, model.to(device).eval().requires_grad_(False), tokenizer, day)


def _widen_head(model: nn.Module) -> None:
    """Let the layer that makes the scores make them in float32: in bfloat16, those from 4 to 8 are steps of 1/32."""
    heads = [layer for layer in model.modules() if isinstance(layer, nn.Linear)
             and layer.out_features == model.config.num_labels]
    if heads and heads[-1].weight.dtype != torch.float32:
        heads[-1].float().register_forward_pre_hook(lambda _, inputs: tuple(one.float() for one in inputs))


def _longest(model: torch.nn.Module) -> int | None:
    """How many tokens a classifier reads; None: no limit is known."""
    limit = getattr(model.config, "max_position_embeddings", None) or 0
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    if limit < 1:       # XLNet says −1
        return None
    return limit - (padding[0] + 1) if padding else limit  # RoBERTa's positions start behind the padding id


def _labels(config: PreTrainedConfig, path: str) -> dict[str, int]:
    """Which output each label is: by ``id2label``, as transformers' pipelines have it.

    Raises:
        ScorerError: it does not name each output once, or ``label2id`` says otherwise.
    """
    names, other = config.id2label, config.label2id or {}
    labels = {name: index for index, name in names.items()}
    if sorted(names) != list(range(config.num_labels)) or len(labels) != len(names):
        raise ScorerError(f"reward {path}: its config.json has id2label {names}, wanted one name for each output, "
                          "numbered from 0; mend it there.")
    if other and {name: str(index) for name, index in other.items()} != {name: str(i) for name, i in labels.items()}:
        raise ScorerError(f"reward {path}: its config.json contradicts itself: id2label is {names}, label2id {other}. "
                          "Which output is which label? Mend the wrong one, or take label2id out.")
    return labels


def _chosen_logit(entry: ModelReward | ClassifierReward, model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """From a classifier's logits [B, K] to one score per row [B]."""
    labels = _labels(model.config, entry.path)
    if entry.kind == "model":
        if model.config.num_labels != 1:
            raise ScorerError(
                f"reward {entry.path}: kind: model wants one output, found {model.config.num_labels} labels "
                f"({', '.join(labels)}); use kind: classifier and name a label."
            )
        return lambda logits: logits[:, 0]
    kind = getattr(model.config, "problem_type", None)
    single = model.config.num_labels == 1
    if entry.label not in labels and not (single and entry.label is None):
        raise ScorerError(f"reward {entry.path}: no label {entry.label!r}; it has {', '.join(labels)}.")
    if kind == REGRESSION and entry.output == "probability":
        raise ScorerError(f"reward {entry.path}: output: probability, but its problem_type is {kind}: it has none.")
    index = 0 if single else labels[entry.label]
    if single or kind in (REGRESSION, MULTI_LABEL):     # no label excludes another: an output is its own log-odds
        return lambda logits: logits[:, index].sigmoid() if entry.output == "probability" else logits[:, index]
    if entry.output == "probability":
        return lambda logits: logits.softmax(-1)[:, index]

    def log_odds(logits: Tensor) -> Tensor:
        rest = torch.cat([logits[:, :index], logits[:, index + 1 :]], dim=1)
        return logits[:, index] - rest.logsumexp(dim=1)

    return log_odds
