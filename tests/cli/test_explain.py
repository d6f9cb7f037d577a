"""``kltune explain`` has an answer for every key, metric and exit code, and for nothing else."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kltune import errors
from kltune.cli import explain, main
from kltune.cli.explain import answer_to, key_text, table
from kltune.errors import EXIT_CODES, Interrupted, KltuneError
from kltune.recipe import STAGES
from kltune.recipe.writing import by_dotted_key, keys_named, recipe_keys
from kltune.run.metrics import METRICS, metric_named
from kltune.run.subprocesses import STOP_SIGNALS
from tests.known_metrics import unknown_metrics

ROOT = Path(__file__).parents[2]

TARGET = """\
# kl.target

KL(policy‖reference) to hold, in kl.unit; 6 nats is a start

- wanted: a number above 0 or null
- default: 6.0
- read by: ppo, trpo, dpo, distill
- example:

      kl: {target: 6.0}
"""
KP = """\
# kl.kp

gain on the error now (log_pi)

- wanted: a number at least 0
- default: 0.35 (ppo, distill), 0.7 (trpo), 3.0 (dpo)
- read by: ppo, trpo, dpo, distill
- example:

      kl: {kp: 0.35}
"""
INPUT = """\
# reward.input

- function, judge: how prompts reach it: as text, or as the messages that the policy was asked by, with their roles \
(a plain prompt is one of the user)
- model: what the model reads
- classifier: what the classifier reads

- wanted: text or messages (function, judge), prompt_response or response (model, classifier)
- default: text (function, judge), prompt_response (model), response (classifier)
- read by: ppo, trpo, dpo (kind: function, model, classifier or judge)
- example:

      reward:
      - {kind: function, path: 'rewards.py:score', input: text}
"""
STDERR = """\
# kl/ref_stderr

standard error of kl/ref_nats_per_response; responses to one prompt count as dependent

- unit: nats per response
- range: 0 or above; null where it was not measured
- written by: ppo, trpo, dpo, distill
- example:

      "kl/ref_stderr": 0.11
"""
ASKED = """\
# judge/NAME_asked

questions sent to the judge NAME since the last row, tries included

- unit: questions
- range: 0 or above; null where it was not measured
- written by: sft, ppo, trpo, dpo, distill
- example:

      "judge/NAME_asked": 64
"""
REFERENCE = """\
# eval/reference_score_mean

as eval/score_mean, of the reference's own answers (texts: by the reference); measured once in a run

- unit: score
- range: any number; null where it was not measured
- written by: ppo, trpo, dpo
- example:

      "eval/reference_score_mean": 1.6
"""
CODE_3 = """\
# exit code 3

eval-kl --max-kl: over the budget at the stated confidence, the whole interval lies above it

- what to do: scale the adapter back with kltune project, or train with a lower kl.target or with kl.hard_cap
- example:

      kltune eval-kl runs/ppo --max-kl 4
"""
# of the keys that a stage's recipe has, those that it refuses (`kltune recipe check` says why)
REFUSED = {
    "sft": {"data.prompts", "data.pairs", "sampling.prompts_per_step", "eval.pairs", "eval.pairs_share",
            "eval.stop_at_gold_peak", "run.until"},
    "reward": {"data.prompts", "data.texts", "eval.prompts", "eval.responses", "eval.texts", "eval.gold", "eval.judge",
               "eval.stop_at_gold_peak", "run.until"},
    "ppo": {"data.texts", "data.pairs", "optim.batch_size", "eval.pairs", "eval.pairs_share"},
    "trpo": {"data.texts", "data.pairs", "optim.batch_size", "eval.pairs", "eval.pairs_share"},
    "dpo": {"data.texts", "eval.pairs_share"},
    "distill": {"data.texts", "data.pairs", "optim.batch_size", "sampling.missing_end_penalty", "eval.pairs",
                "eval.pairs_share", "eval.stop_at_gold_peak"},
}
WRITTEN = {"distill": {"distill": {"teacher": "runs/ppo/final"}}}       # sections that a stage wants


@pytest.fixture
def ask(capsys):
    """A function from words to exit code, stdout and stderr of ``kltune explain``."""

    def ask(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(["explain", *words])
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return ask


@pytest.mark.parametrize(("word", "text"), [
    ("kl.target", TARGET), ("kp", KP), ("reward[].input", INPUT), ("reward.0.input", INPUT),
    ("kl/ref_stderr", STDERR), ("judge/quality_asked", ASKED), ("judge/NAME_asked", ASKED),
    ("eval/reference_score_mean", REFERENCE), ("3", CODE_3),
])
def test_the_answer_to_a_word(ask, word, text):
    assert ask(word) == (0, text, "")


# recipe keys


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_is_explained_with_meaning_default_and_reader(stage):
    recipe = STAGES[stage].model_validate({"stage": stage, "model": {"path": "base"}} | WRITTEN.get(stage, {}))
    keys = set(by_dotted_key(recipe.model_dump()))
    read = {key for key, entry in recipe_keys().items() if stage in entry.read_by}
    assert keys - read == REFUSED[stage]
    for key in keys - REFUSED[stage]:
        entry = recipe_keys()[key]
        assert entry.meaning[stage], key
        written_out = re.search(r"^- default: (.+)$", key_text(entry), re.MULTILINE)
        assert written_out, key
        assert re.search(rf"^- read by: .*\b{stage}\b", key_text(entry), re.MULTILINE), key


def test_an_example_is_right_for_the_first_stage_that_reads_it():
    for key, entry in recipe_keys().items():
        if not entry.example:      # a section
            continue
        example, stage = yaml.safe_load(entry.example), entry.read_by[0]
        whole = {"stage": stage, "model": {"path": "base"}} | WRITTEN.get(stage, {}) | example
        whole["model"] = {"path": "base"} | whole["model"]
        STAGES[stage].model_validate(whole)
        assert f'"{key.split(".")[-1]}": ' in json.dumps(example)


def test_a_bare_name_that_several_sections_have_brings_all_of_them(ask):
    assert [key.key for key in keys_named("hard_cap")] == ["kl.hard_cap"]
    assert [key.key for key in keys_named("beta")] == ["kl.beta", "dpo.beta"]
    _, out, _ = ask("label_smoothing")
    assert re.findall(r"^# (.+)$", out, re.MULTILINE) == ["bradley_terry.label_smoothing", "dpo.label_smoothing"]


def test_a_section_lists_its_keys(ask):
    _, out, _ = ask("bradley_terry")
    rows = [line.split(" | ")[:2] for line in out.splitlines() if line.startswith("| bradley")]
    assert rows == [["| bradley_terry.label_smoothing", "0.0"], ["| bradley_terry.centring", "0.01"]]


# metrics


def test_the_registry_is_whole():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.unit, metric
        assert metric.range, metric
        assert set(metric.stages) <= set(STAGES), metric
        assert "|" not in metric.meaning + metric.unit + metric.range, metric      # it goes into a table


def test_every_metric_that_the_code_names_is_in_the_registry():
    groups = "|".join({metric.name.partition("/")[0] for metric in METRICS if "/" in metric.name})
    named = {
        node.value
        for path in (ROOT / "kltune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        and re.fullmatch(rf"({groups})/[a-z0-9_]*[a-z0-9]", node.value)
    }
    beginnings = {"kl/ref", "eval/kl_ref"}      # to which code adds _stderr and the unit
    assert len(named) > 80
    assert {name for name in named - beginnings if metric_named(name) is None} == set()


def test_a_metric_is_known_to_the_stages_that_write_it():
    assert unknown_metrics(["kl/beta", "judge/a b_kept", "eval/reference_gold_z"], "ppo") == []
    assert unknown_metrics(["kl/beta", "sft/tokens", "kl/betta", "eval/reference_kl_ref_stderr"], "ppo") == [
        "sft/tokens", "kl/betta", "eval/reference_kl_ref_stderr"
    ]


# exit codes


def test_every_exit_code_that_an_error_has_is_explained():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KltuneError)]
    codes = {kind.exit_code for kind in kinds}
    codes |= {Interrupted("", number).exit_code for number in STOP_SIGNALS}
    assert codes | {0, 3, 4, 137} == set(EXIT_CODES)      # done; eval-kl's two; a sweep's for a point that was killed


# guides


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A folder with two guides, in the place of kltune's own."""
    (tmp_path / "README.md").write_text("Not a guide.")
    (tmp_path / "metrics.md").write_text("# Metrics\n\n`null` is what was\nnot measured. Never 0.\n")
    (tmp_path / "dpo.md").write_text("# DPO\n\nPairs. And more.\n")
    monkeypatch.setattr(explain, "DOCS", tmp_path)


@pytest.mark.usefixtures("docs")
def test_without_a_word_it_lists_guides_by_their_first_sentence(ask):
    code, out, _ = ask()
    assert code == 0
    assert out.splitlines()[:4] == [
        "# What kltune explains", "", "- `kltune explain dpo`: Pairs.",
        "- `kltune explain metrics`: `null` is what was not measured.",
    ]
    codes = "0, 1, 2, 3, 4, 5, 6, 74, 75, 129, 130, 137, 138, 143"
    assert out.splitlines()[-1] == f"- `kltune explain CODE`: an exit code: {codes}"


@pytest.mark.usefixtures("docs")
def test_a_guide_comes_before_the_keys_of_its_name(ask):
    assert ask("dpo")[1].startswith("# DPO\n\nPairs. And more.\n\n# dpo\n\nPreference pairs.\n")
    _, out, _ = ask("metrics")
    guide, _, whole_table = out.partition("\n\n## Every key of metrics.jsonl\n\n")
    assert guide == "# Metrics\n\n`null` is what was\nnot measured. Never 0."
    assert all(f"| {metric.name} | {metric.unit} |" in whole_table for metric in METRICS)


@pytest.mark.usefixtures("docs")
def test_a_terminal_gets_markdown_laid_out(ask, monkeypatch):
    monkeypatch.setattr(explain, "wants_colour", lambda stream: True)
    code, out, _ = ask("kl.target")
    assert code == 0
    assert " • default: 6.0" in out
    assert "# kl.target" not in out


def test_a_table_is_markdown():
    assert table(("a", "b"), [("1", "2")]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]


# the command


@pytest.mark.parametrize(("word", "message"), [
    ("kl.targt", "nothing here has that name; did you mean kl.target, target or lora.targets?"),
    ("kl_coef", "called kl.beta here (score per nat)"),
    ("7", "no exit code of kltune; they are 0, 1, 2, 3, 4, 5, 6, 74, 75, 129, 130, 137, 138, 143"),
    ("../metrics", "nothing here has that name; did you mean metrics?"),
    ("quux", "nothing here has that name; kltune explain lists what has one"),
])
def test_an_unknown_word_ends_with_2_and_the_nearest_names(ask, docs, word, message):
    assert ask(word) == (2, "", f"kltune: error: {word}: {message}\n")


def test_json_is_one_document(ask):
    code, out, _ = ask("kl.kp", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["keys"][0]["default"] == {"ppo": 0.35, "trpo": 0.7, "dpo": 3.0, "distill": 0.35}
    assert document | {"keys": []} == {
        "schema": "kltune.explain/1", "asked": "kl.kp", "guides": [], "keys": [], "metrics": [], "codes": [],
    }
    whole = json.loads(ask("--json")[1])
    assert len(whole["keys"]) == len(recipe_keys())
    assert [entry["code"] for entry in whole["codes"]] == list(EXIT_CODES)


def test_everything_that_is_listed_can_be_asked_for():
    for key in recipe_keys():
        assert key in {entry.key for entry in answer_to(key).keys}
    for metric in METRICS:
        assert answer_to(metric.name).metrics == [metric]


def test_no_answer_imports_torch():
    code = (
        "import sys\nfrom kltune.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for word in (["kl.target"], ["metrics"], ["4"], [], ["quux"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, "explain", *word]
        done = subprocess.run(command, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
