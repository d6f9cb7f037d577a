"""Scores are one finite number per response from a known source, and everything else names the row and stops."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLNetConfig,
    pipeline,
)

from kltune.errors import DataError, ScorerError
from kltune.lm.data.examples import Prompt
from kltune.lm.model.batches import Samples
from kltune.lm.rewards.classifiers import Classifier
from kltune.lm.rewards.inputs import folder_sha256
from kltune.lm.rewards.scorers import Scorer, ScoreSource, load_scorer, run_source
from kltune.recipe import ClassifierReward, FunctionReward, ModelReward
from tests.tiny_policies import EOS, VOCABULARY, save_tiny_model, word_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["why ", "how ", "who "]
RESPONSES = ["one", "three", "eleven"]


def source(function: Callable, name: str = "mine", weight: float = 1.0, normalize: bool = False) -> ScoreSource:
    return ScoreSource(name, function, weight, normalize, {})


def lengths(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def vowels(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in response)) for response in responses]


# --- functions -----------------------------------------------------------------------------------------------------


def write_function(folder: Path, code: str, file: str = "rewards.py") -> bytes:
    (folder / file).write_text(code)
    return (folder / file).read_bytes()


def load_function(folder: Path, path: str = "rewards.py:score", **keys) -> Scorer:
    return load_scorer([FunctionReward(kind="function", path=path, **keys)], folder, CPU)


def test_files_beside_a_function_are_imported_as_they_were_hashed(tmp_path):
    write_function(tmp_path, "def score(p, r):\n    from words import count\n    return [count(t) for t in r]\n")
    write_function(tmp_path, "import letters\n\ndef count(text):\n    return letters.of(text)\n", "words.py")
    write_function(tmp_path, "def of(text):\n    return float(text.count('e'))\n", "letters.py")
    first = load_function(tmp_path)
    assert first(PROMPTS, RESPONSES).tolist() == [1.0, 2.0, 3.0]
    identity = first.sources[0].identity
    assert identity["imports"] == "letters.py, words.py"
    write_function(tmp_path, "def of(text):\n    return float(text.count('l'))\n", "letters.py")
    second = load_function(tmp_path)
    assert second(PROMPTS, RESPONSES).tolist() == [0.0, 0.0, 1.0]
    assert second.sources[0].identity["sha256"] != identity["sha256"]


def test_files_of_one_name_beside_two_functions_are_two(tmp_path):
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_function(folder, "from words import WEIGHT\ndef score(p, r):\n    return [WEIGHT for _ in r]\n")
        write_function(folder, f"WEIGHT = {number}.0\n", "words.py")
        assert load_function(folder)(PROMPTS, RESPONSES).tolist() == [number] * 3


def test_what_cannot_be_imported_comes_with_the_way_on(tmp_path):
    (tmp_path / "package").mkdir()
    write_function(tmp_path, "from package import count\n")
    (tmp_path / "package" / "__init__.py").write_text("")
    with pytest.raises(ScorerError, match=r"ImportError|ModuleNotFoundError") as caught:
        load_function(tmp_path)
    assert f"files that lie beside it in {tmp_path}, by their own names" in str(caught.value)


def test_a_function_beside_the_recipe_gets_prompts_and_responses_as_lists_of_text(tmp_path):
    code = write_function(
        tmp_path,
        "def score(prompts, responses):\n"
        "    assert isinstance(prompts, list) and isinstance(responses, list)\n"
        "    return [len(p) + 10 * len(r) for p, r in zip(prompts, responses)]\n",
    )
    scorer = load_function(tmp_path)
    scores = scorer(tuple(PROMPTS), tuple(RESPONSES))
    assert scores.tolist() == [34.0, 54.0, 64.0]
    assert scores.dtype == torch.float32
    identity = {"kind": "function", "path": "rewards.py:score", "sha256": hashlib.sha256(code).hexdigest()}
    assert scorer.sources[0].identity == identity


def test_a_function_that_asks_for_messages_gets_them_and_the_row_that_fails_is_named_by_its_text(tmp_path):
    code = "return [len(p) + 1 / (p[-1]['content'] != 'no') for p in asked]"
    write_function(tmp_path, f"def score(asked, said):\n    {code}\n")
    scorer = load_function(tmp_path, input="messages")
    asked = [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], ()]
    assert scorer(["system: be kind\n\nuser: hi", "plain"], ["a", "b"], [sampled("xy", "ab", asked)]).tolist() == [3, 2]
    assert scorer(["plain"], ["a"]).tolist() == [2]
    assert scorer.identity[0]["input"] == "messages"
    with pytest.raises(ScorerError, match=r"row 1 \(prompt 'no', response 'b'\) raised ZeroDivisionError"):
        scorer(["plain", "no"], ["a", "b"])


def test_what_was_hashed_is_what_runs_even_if_the_file_changes(tmp_path):
    write_function(tmp_path, "def score(prompts, responses):\n    return [1] * len(responses)\n")
    scorer = load_function(tmp_path)
    write_function(tmp_path, "def score(prompts, responses):\n    return [2] * len(responses)\n")
    assert scorer(PROMPTS, RESPONSES).tolist() == [1.0] * 3
    assert load_function(tmp_path)(PROMPTS, RESPONSES).tolist() == [2.0] * 3


def test_a_rewards_file_may_define_dataclasses_under_postponed_annotations(tmp_path):
    write_function(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Rule:\n"
        "    factor: float\n"
        "def score(prompts, responses):\n"
        "    return [Rule(2.0).factor * len(r) for r in responses]\n",
    )
    assert load_function(tmp_path)(PROMPTS, RESPONSES).tolist() == [6.0, 10.0, 12.0]


def test_two_rewards_files_of_the_same_name_do_not_meet(tmp_path):
    for folder, number in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        code = f"N = {number}\ndef score(prompts, responses):\n    return [N] * len(responses)\n"
        write_function(tmp_path / folder, code)
    one, two = load_function(tmp_path / "one"), load_function(tmp_path / "two")
    assert one(PROMPTS, RESPONSES).tolist() == [1.0] * 3
    assert two(PROMPTS, RESPONSES).tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("code", "path", "message"),
    [
        ("", "absent.py:score", "absent.py cannot be read"),
        ("x = 1\n", "rewards.py:score", "has no function 'score'"),
        ("score = 3\n", "rewards.py:score", "has no function 'score'"),
        ("def score(:\n", "rewards.py:score", "raised SyntaxError"),
        ("import no_such_module_at_all\n", "rewards.py:score", "raised ModuleNotFoundError"),
        ("1 / 0\n", "rewards.py:score", "raised ZeroDivisionError"),
        ("open('no_such_file')\n", "rewards.py:score", "importing .* raised FileNotFoundError"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_with_the_reason(tmp_path, code, path, message):
    write_function(tmp_path, code)
    with pytest.raises(ScorerError, match=message) as error:
        load_function(tmp_path, path)
    assert path in str(error.value)


def test_two_sources_of_one_name_are_kept_apart(tmp_path):
    write_function(tmp_path, "def score(prompts, responses):\n    return [1] * len(responses)\n")
    entry = FunctionReward(kind="function", path="rewards.py:score")
    named = FunctionReward(kind="function", path="rewards.py:score", name="mine")
    scorer = load_scorer([entry, entry, named], tmp_path, CPU)
    assert [s.name for s in scorer.sources] == ["score", "score-1", "mine"]
    assert scorer(PROMPTS, RESPONSES).tolist() == [3.0] * 3


# --- what a source may return --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda x: torch.tensor(x).double()])
def test_lists_tuples_arrays_and_tensors_of_numbers_are_scores(kind):
    scores = run_source(source(lambda p, r: kind([1, 2.5, -3])), PROMPTS, RESPONSES)
    assert scores.tolist() == [1.0, 2.5, -3.0]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize("number", [np.float32(2.5), np.float64(2.5), np.int64(3), torch.tensor(2.5)])
def test_a_list_of_numpy_or_torch_numbers_is_scores(number):
    assert run_source(source(lambda p, r: [number] * 3), PROMPTS, RESPONSES).tolist() == [float(number)] * 3


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, True, None, "3.0", [1.0], 1 + 2j, 1e39, 10**50, np.float32("nan"), np.True_]
)
def test_a_score_that_is_no_finite_number_names_its_row_and_its_text(bad):
    with pytest.raises(ScorerError, match="reward mine: row 1 ") as error:
        run_source(source(lambda p, r: [0.0, bad, bad]), PROMPTS, RESPONSES)
    assert "'how '" in str(error.value)
    assert "'three'" in str(error.value)
    assert "wanted a finite number" in str(error.value)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned 2 scores for 3 responses"),
        ([], "returned 0 scores for 3 responses"),
        (None, "returned NoneType, wanted a list of 3 numbers"),
        (1.0, "returned float, wanted a list of 3 numbers"),
        ("123", "returned str, wanted a list of 3 numbers"),
        (torch.tensor(1.0), "returned Tensor, wanted a list of 3 numbers"),
        (torch.ones(3, 1), "row 0"),
        (np.array([True, False, True]), "row 0"),
    ],
)
def test_anything_but_one_number_per_response_is_refused(result, message):
    with pytest.raises(ScorerError, match=message):
        run_source(source(lambda p, r: result), PROMPTS, RESPONSES)


def test_an_exception_names_the_row_that_raised_it():
    def fails(prompts, responses):
        return [1 / (len(response) - 5) for response in responses]

    with pytest.raises(ScorerError, match=r"row 1 .*'three'.* raised ZeroDivisionError: ") as error:
        run_source(source(fails), PROMPTS, RESPONSES)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_exception_that_only_a_batch_raises_says_so():
    def fails(prompts, responses):
        if len(responses) > 1:
            raise RuntimeError("too many")
        return [0.0]

    with pytest.raises(ScorerError, match=r"the batch of 3 \(each row alone is fine\) raised RuntimeError: too many"):
        run_source(source(fails), PROMPTS, RESPONSES)


def test_a_fault_that_a_user_can_put_right_keeps_its_own_words():
    def fails(prompts, responses):
        raise DataError("the word list is missing")

    with pytest.raises(DataError, match=r"^the word list is missing$"):
        run_source(source(fails), PROMPTS, RESPONSES)


# --- sums and standardisation --------------------------------------------------------------------------------------


def test_the_total_is_the_weighted_sum_by_hand():
    scorer = Scorer([source(lengths, "lengths", 0.5), source(vowels, "vowels", -2.0)])
    scores = scorer(PROMPTS, RESPONSES)
    assert run_source(scorer.sources[0], PROMPTS, RESPONSES).tolist() == [3.0, 5.0, 6.0]
    assert run_source(scorer.sources[1], PROMPTS, RESPONSES).tolist() == [2.0, 2.0, 3.0]
    assert scores.tolist() == [-2.5, -1.5, -3.0]


def test_normalize_shifts_and_scales_by_hand_and_only_where_asked():
    scorer = Scorer([source(lengths, "lengths", 3.0, normalize=True), source(vowels, "vowels")])
    assert scorer.wants_reference_samples
    ready = scorer.standardized(["", "", ""], ["ab", "abcd", "abcdef"])  # lengths 2, 4, 6: mean 4, sd 2
    assert not ready.wants_reference_samples
    assert [(s.shift, s.scale) for s in ready.sources] == [(4.0, 2.0), (0.0, 1.0)]
    scores = ready(PROMPTS, RESPONSES)
    assert scores.tolist() == [3 * -0.5 + 2, 3 * 0.5 + 2, 3 * 1.0 + 3]
    assert run_source(ready.sources[0], PROMPTS, RESPONSES).tolist() == [3.0, 5.0, 6.0]  # as they came
    assert scorer.sources[0].scale == 1.0  # the old one is unchanged


def test_scores_that_are_all_equal_have_no_spread_to_divide_by():
    scorer = Scorer([source(lengths, "lengths", normalize=True)])
    with pytest.raises(ScorerError, match=r"reward lengths: all 3 reference samples score 2, .*set normalize: false"):
        scorer.standardized(["", "", ""], ["ab", "cd", "ef"])


def test_the_standardisation_survives_a_checkpoint():
    scorer = Scorer([source(lengths, "lengths", 3.0, normalize=True), source(vowels, "vowels")])
    ready = scorer.standardized(["", "", ""], ["ab", "abcd", "abcdef"])
    again = scorer.restored(ready.state(), {})
    assert again.state() == ready.state()
    assert [(saved["shift"], saved["scale"]) for saved in ready.state()["sources"]] == [(4.0, 2.0), (0.0, 1.0)]
    assert not again.wants_reference_samples
    assert torch.equal(again(PROMPTS, RESPONSES), ready(PROMPTS, RESPONSES))


# --- models --------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
TEXTS = ["w3", "w4 w5 w6 w7 w8 w9", "w10 w11", "w30 w31 w32"]
NO_PROMPTS = [""] * len(TEXTS)


def classifier_config(architecture: str, labels: list[str], longest: int = 32) -> PreTrainedConfig:
    named = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if architecture == "bert":
        return BertConfig(**SIZES, max_position_embeddings=longest, pad_token_id=EOS, **named)
    if architecture == "roberta":  # its first position is pad_token_id + 1
        return RobertaConfig(**SIZES, max_position_embeddings=longest, pad_token_id=EOS, **named)
    if architecture == "llama":
        return LlamaConfig(**SIZES, max_position_embeddings=longest, bos_token_id=0, eos_token_id=EOS, **named)
    if architecture == "xlnet":  # it reads the last token, which padding on the right would be
        sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
        return XLNetConfig(vocab_size=VOCABULARY, **sizes, pad_token_id=EOS, **named)
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=longest, initializer_range=0.3,
        bos_token_id=0, eos_token_id=EOS, **named,
    )  # fmt: skip


def save_classifier(folder: Path, architecture: str = "bert", labels=("bad", "good", "mixed"), **tokenizer) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(classifier_config(architecture, list(labels)))
    model.save_pretrained(folder)
    own = word_tokenizer()
    for name, value in tokenizer.items():
        setattr(own, name, value)
    own.save_pretrained(folder)
    return folder


def plain_logits(folder: Path, text: str) -> torch.Tensor:
    """The classifier's logits for one text alone, float64."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).logits[0].double()


def load_classifier(folder: Path, **keys) -> Scorer:
    return load_scorer([ClassifierReward(kind="classifier", path=str(folder), **keys)], folder, CPU)


def load_model(folder: Path, **keys) -> Scorer:
    return load_scorer([ModelReward(kind="model", path=str(folder), **keys)], folder, CPU)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "gpt2"])
def test_a_classifiers_score_is_the_labels_log_odds_or_probability(tmp_path, architecture):
    folder = save_classifier(tmp_path, architecture)
    odds, probability = [], []
    for text in TEXTS:
        p = plain_logits(folder, text).softmax(-1)[1].item()
        probability.append(p)
        odds.append(math.log(p / (1 - p)))
    assert max(probability) - min(probability) > 0.01
    scorer = load_classifier(folder, label="good")
    assert scorer(NO_PROMPTS, TEXTS).tolist() == pytest.approx(odds, abs=1e-5)
    assert scorer.sources[0].identity["kind"] == "classifier"
    assert scorer.sources[0].identity["path"] == str(folder)
    scorer = load_classifier(folder, label="good", output="probability")
    assert scorer(NO_PROMPTS, TEXTS).tolist() == pytest.approx(probability, abs=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "gpt2"])
def test_a_text_scores_the_same_beside_longer_ones_and_alone(tmp_path, architecture, side):
    folder = save_classifier(tmp_path, architecture, padding_side=side)
    scorer = load_classifier(folder, label="good")
    together = scorer(NO_PROMPTS, TEXTS)
    alone = torch.cat([scorer([""], [text]) for text in TEXTS])
    assert (together - alone).abs().max() < 1e-5
    many = scorer(NO_PROMPTS * 20, TEXTS * 20)  # more than one batch of the scorer's own
    assert (many - together.repeat(20)).abs().max() < 1e-5


def test_a_classifier_reads_the_response_and_a_reward_model_the_prompt_too(tmp_path):
    three, one = save_classifier(tmp_path / "three"), save_classifier(tmp_path / "one", labels=["reward"])
    classifier = load_classifier(three, label="good")
    assert torch.equal(classifier(["w20 w21 "] * 4, TEXTS), classifier(NO_PROMPTS, TEXTS))
    both = load_classifier(three, label="good", input="prompt_response")
    assert torch.equal(both(["w20 w21 "], ["w3"]), classifier([""], ["w20 w21 w3"]))
    model = load_model(one)
    by_hand = plain_logits(one, "w20 w21 w3").tolist()
    assert model(["w20 w21 "], ["w3"]).tolist() == pytest.approx(by_hand, abs=1e-5)
    assert load_model(one, input="response")(["w20 w21 "], ["w3"]).tolist() == pytest.approx(
        plain_logits(one, "w3").tolist(), abs=1e-5
    )


def test_a_label_that_is_not_there_names_those_that_are(tmp_path):
    folder = save_classifier(tmp_path)
    for label in ("great", None):
        with pytest.raises(ScorerError, match=f"no label {label!r}; it has bad, good, mixed"):
            load_classifier(folder, label=label)


def relabelled(folder: Path, **maps) -> Path:
    """A classifier whose configuration names its labels so; None takes a map out."""
    config = json.loads((folder / "config.json").read_text()) | maps
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_labels_are_those_of_id2label_as_in_transformers_own_pipeline(tmp_path):
    folder = relabelled(save_classifier(tmp_path), id2label={"0": "good", "1": "bad", "2": "mixed"}, label2id=None)
    wanted = [one["score"] for row in pipeline("text-classification", str(folder), top_k=None)(TEXTS)
              for one in row if one["label"] == "bad"]
    found = load_classifier(folder, label="bad", output="probability")(NO_PROMPTS, TEXTS).tolist()
    assert found == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ScorerError, match="no label 'great'; it has good, bad, mixed"):
        load_classifier(folder, label="great")


@pytest.mark.parametrize("maps", [
    {"label2id": {"bad": 1, "good": 0, "mixed": 2}}, {"label2id": {"bad": 0, "good": 5, "mixed": 2}},
    {"label2id": {"bad": 0, "good": -1, "mixed": 2}}, {"label2id": {"good": 1}},
    {"id2label": {"1": "bad", "2": "good", "3": "mixed"}}, {"id2label": {"0": "bad", "1": "good", "2": "good"}},
])
def test_labels_that_contradict_each_other_are_refused(tmp_path, maps):
    folder = relabelled(save_classifier(tmp_path), **maps)
    with pytest.raises(ScorerError, match=r"config\.json (contradicts itself|has id2label)"):
        load_classifier(folder, label="good")


def test_a_classifier_with_a_single_output_needs_no_label(tmp_path):
    folder = save_classifier(tmp_path, labels=["reward"])
    by_hand = [plain_logits(folder, text).item() for text in TEXTS]
    for keys in ({}, {"label": "reward"}):
        assert load_classifier(folder, **keys)(NO_PROMPTS, TEXTS).tolist() == pytest.approx(by_hand, abs=1e-5)
    probability = load_classifier(folder, output="probability")(NO_PROMPTS, TEXTS).tolist()
    assert probability == pytest.approx([1 / (1 + math.exp(-x)) for x in by_hand], abs=1e-5)


def test_a_reward_model_has_one_output(tmp_path):
    folder = save_classifier(tmp_path, labels=["bad", "good"])
    with pytest.raises(ScorerError, match=r"wants one output, found 2 labels \(bad, good\); use kind: classifier"):
        load_model(folder)


def of_kind(folder: Path, problem_type: str) -> Path:
    """A classifier whose configuration says how its labels are related."""
    config = json.loads((folder / "config.json").read_text()) | {"problem_type": problem_type}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "single_label_classification"])
def test_a_labels_probability_is_that_of_transformers_own_pipeline(tmp_path, problem_type):
    folder = of_kind(save_classifier(tmp_path), problem_type)
    scorer = load_classifier(folder, label="good", output="probability")
    classify = pipeline("text-classification", str(folder), top_k=None)
    wanted = [one["score"] for row in classify(TEXTS) for one in row if one["label"] == "good"]
    assert scorer(NO_PROMPTS, TEXTS).tolist() == pytest.approx(wanted, abs=1e-6)


def test_labels_that_do_not_exclude_each_other_have_log_odds_of_their_own(tmp_path):
    folder = of_kind(save_classifier(tmp_path), "multi_label_classification")
    by_hand = [plain_logits(folder, text)[1].item() for text in TEXTS]     # log σ(x) − log(1 − σ(x)) = x
    assert load_classifier(folder, label="good")(NO_PROMPTS, TEXTS).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_one_of_several_fitted_numbers_is_the_score_and_no_probability(tmp_path):
    folder = of_kind(save_classifier(tmp_path), "regression")
    by_hand = [plain_logits(folder, text)[1].item() for text in TEXTS]
    assert load_classifier(folder, label="good")(NO_PROMPTS, TEXTS).tolist() == pytest.approx(by_hand, abs=1e-5)
    with pytest.raises(ScorerError, match="its problem_type is regression: it has none"):
        load_classifier(folder, label="good", output="probability")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_scores_of_a_model_in_bfloat16_are_not_rounded_to_it(tmp_path, architecture):
    folder = save_classifier(tmp_path, architecture, labels=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).eval()
    head = model.classifier if architecture == "bert" else model.score
    read = []
    head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float()))
    own, texts = AutoTokenizer.from_pretrained(folder), [f"w{3 + i} w{9 + i}" for i in range(20)]
    by_hand = []
    for text in texts:
        with torch.no_grad():
            model(input_ids=own(text, return_tensors="pt")["input_ids"])
        states = read.pop().reshape(-1, head.in_features)[-1]       # of the last token; BERT's are pooled already
        by_hand.append((states @ head.weight[0].float() + (0 if head.bias is None else head.bias[0].float())).item())
    scores = Classifier(ModelReward(kind="model", path=str(folder)), model, own)([""] * len(texts), texts)
    assert scores == pytest.approx(by_hand, abs=1e-5)
    assert torch.tensor(scores).bfloat16().tolist() != scores


def test_a_begin_token_that_a_prompt_spells_is_not_read_twice(tmp_path):
    # As in prompts that a chat template was applied to beforehand, by the Llama 3 family's templates.
    folder = save_classifier(tmp_path, "llama", labels=["score"])
    own = AutoTokenizer.from_pretrained(folder)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.backend_tokenizer.post_processor = begin
    own.save_pretrained(folder)
    by_hand = plain_logits(folder, "w3 w4 w5").item()
    scores = load_model(folder)(["<s> w3", "w3"], [" w4 w5", " w4 w5"])
    assert scores.tolist() == pytest.approx([by_hand, by_hand], abs=1e-5)


def test_a_model_without_a_trained_head_is_no_classifier(tmp_path):
    # transformers would make a random head and only warn: every score would be noise.
    folder = save_tiny_model(tmp_path)
    with pytest.raises(ScorerError, match=r"score\.weight"):
        load_classifier(folder, label="LABEL_1")


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2"])
def test_a_text_longer_than_the_classifier_reads_is_scored_and_nothing_crashes(tmp_path, architecture):
    scorer = load_classifier(save_classifier(tmp_path, architecture), label="good")
    assert torch.isfinite(scorer([""], ["w3 " * 100])).all()


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ScorerError, match="could not be loaded as a sequence classifier"):
        load_classifier(tmp_path, label="good")


@pytest.mark.parametrize("named", [None, -1, VOCABULARY + 9, EOS, 3], ids=["none", "-1", "beyond", "eos", "a word"])
@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "xlnet"])
def test_whatever_padding_config_and_tokenizer_name_a_text_scores_as_it_does_alone(tmp_path, architecture, named):
    if architecture in ("bert", "xlnet") and named not in (EOS, 3):
        pytest.skip("its embedding wants a padding id that it has")
    folder = save_classifier(tmp_path / "given", architecture, padding_side="left", pad_token="w7")
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": named}
    (folder / "config.json").write_text(json.dumps(config))
    texts = [*TEXTS, "w3 w7 w7", "w4 </s>"]        # the tokenizer's padding token and the end token as text's last ones
    plain = shutil.copytree(folder, tmp_path / "plain")     # transformers opens nothing whose id has no embedding
    if named == VOCABULARY + 9:
        (plain / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    by_hand = [plain_logits(plain, text) for text in texts]
    odds = [(row[1] - row[[0, 2]].logsumexp(0)).item() for row in by_hand]
    scorer = load_classifier(folder, label="good")
    assert scorer([""] * len(texts), texts).tolist() == pytest.approx(odds, abs=1e-4)


RM_TEMPLATE = (
    "{% for m in messages %}<s> {{ 'w8' if m.role == 'user' else 'w9' }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> w9 {% endif %}"
)
MESSAGES = ({"role": "user", "content": "w20 w21"},)


def sampled(prompts, responses, messages) -> Samples:
    """Samples as a scorer sees them, whose tokens are nobody's business."""
    count = len(prompts)
    none = torch.zeros(count, 1)
    return Samples(
        none.long(), none.bool(), none.bool(), torch.arange(count), torch.zeros(count, dtype=torch.bool), none,
        tuple(prompts), tuple(responses), messages=tuple(messages),
    )


def with_template(folder: Path, template: str = RM_TEMPLATE) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("keys", "messages", "read"), [
    ({}, MESSAGES, "<s> w8 w20 w21 </s> <s> w9 w5 </s>"),
    ({}, (), "w20 w21w5"),
    ({"template": "chat"}, (), "<s> w8 w20 w21 </s> <s> w9 w5 </s>"),
    ({"template": "none"}, MESSAGES, "w20 w21 w5"),
    ({"input": "response"}, MESSAGES, "w5"),
])
def test_a_reward_model_reads_a_conversation_in_its_own_template(tmp_path, keys, messages, read):
    folder = with_template(save_classifier(tmp_path, "llama", labels=["reward"]))
    scorer = load_model(folder, **keys)
    found = scorer(["w20 w21"], ["w5"], [sampled(["w20 w21"], ["w5"], [messages])])
    assert found.tolist() == pytest.approx(plain_logits(folder, read).tolist(), abs=1e-5)
    (example,) = scorer.examples([Prompt((3,), "w20 w21", "", messages)])
    assert ("its own chat template" in example) == read.startswith("<s>")
    assert "RESPONSE" in example or "<unk>" in example      # a word that this tokenizer does not know


def test_a_reward_model_without_a_template_reads_messages_as_text_and_none_is_made_up(tmp_path):
    folder = save_classifier(tmp_path, "llama", labels=["reward"])
    found = load_model(folder)(["w20 w21"], ["w5"], [sampled(["w20 w21"], ["w5"], [MESSAGES])])
    assert found.tolist() == pytest.approx(plain_logits(folder, "w20 w21 w5").tolist(), abs=1e-5)
    with pytest.raises(ScorerError, match="template: chat, but its tokenizer has no chat template"):
        load_model(folder, template="chat")


def test_a_classifier_trains_nothing_and_draws_nothing(tmp_path):
    scorer = load_classifier(save_classifier(tmp_path), label="good")  # dropout 0.1 in the config
    first = scorer(NO_PROMPTS, TEXTS)
    assert torch.equal(scorer(NO_PROMPTS, TEXTS), first)
    assert not first.requires_grad


def test_the_files_of_a_model_are_read_once_for_every_point_of_a_sweep(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "notes.md").write_text("no part of a model")
    read, plain = [], hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda file, name: read.append(file.name) or plain(file, name))
    first = [folder_sha256(tmp_path) for _ in range(3)]
    assert (len(set(first)), len(read)) == (1, 1)
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert folder_sha256(tmp_path) != first[0]
    (tmp_path / "config.json").write_text("{}")
    assert len({*first, folder_sha256(tmp_path)}) == 2
    assert len(read) == 4
