"""A recipe says what it means: numbers are numbers, and wrong keys are named with their line."""

import os
import pickle
import random
import re
from pathlib import Path

import pytest

from kltune.cli import main
from kltune.cli.options import read_scorer
from kltune.errors import Interrupted, RecipeError
from kltune.recipe import (
    PPORecipe,
    RecipeFaults,
    SFTRecipe,
    dump_recipe,
    load_recipe,
    packaged_recipes,
    recipes_folder,
)
from kltune.recipe.yaml_tree import resolve

# six lines, so that what a test adds starts in line 7
PPO = """\
stage: ppo
model: {path: base}
data:
  prompts: prompts.jsonl
reward:
  - {kind: function, path: "rewards.py:score"}
"""
JUDGED = PPO[: PPO.index("  - {")] + "  - {kind: judge, url: 'http://127.0.0.1:8000/v1', model: m, mode: score}\n"
ONLINE = """\
stage: dpo
model: {path: base}
data: {prompts: prompts.jsonl}
sampling: {responses_per_prompt: 4}
dpo: {source: online}
reward:
  - {kind: judge, url: 'http://127.0.0.1:8000/v1', model: m, mode: pair}
"""
SFT = "stage: sft\nmodel: {path: base}\ndata: {texts: texts.jsonl}\n"
DPO = "stage: dpo\nmodel: {path: base}\ndata: {pairs: pairs.jsonl}\n"

# recipe, line of the fault, words of the message
WRONG = {
    "a column that is no field": (PPO.replace("reward:", "  columns: {promt: q}\nreward:"), 5,
                                  ["data.columns.promt", "unknown name", "did you mean prompt?"]),
    "a column that is no text": (PPO.replace("reward:", "  columns: {prompt: 3}\nreward:"), 5,
                                 ["data.columns.prompt", "found 3, wanted text", "put it in quotes"]),
    "misspelt key": (PPO + "kl:\n  targt: 4\n", 8, ["kl.targt", "did you mean target?"]),
    "misspelt section": (PPO + "samplng: {temperature: 1}\n", 7, ["samplng", "did you mean sampling?"]),
    "below its range": (PPO + "kl: {target: -6}\n", 7, ["kl.target", "found -6", "above 0", "nats"]),
    "one response gives no error": (PPO + "eval: {responses: 1}\n", 7, ["eval.responses", "found 1", "at least 2"]),
    "misspelt stage beside another fault": (PPO.replace("ppo", "pppo") + "kl: {targt: 4}\n", 7, ["kl.targt"]),
    "no stage beside another fault": (PPO.partition("\n")[2] + "kl: {targt: 4}\n", 6, ["kl.targt"]),
    "not a number": (PPO + "optim:\n\n  lr: fast\n", 9, ["optim.lr", 'found "fast"', "wanted a number above 0"]),
    "gold that is trained on": (PPO + "eval:\n  gold: {kind: function, path: ./rewards.py:score, weight: 2}\n", 8, [
        "eval.gold", "the scorer of reward.0, which is trained on", "another scorer"]),
    "quoted number": (PPO + 'optim: {lr: "1e-5"}\n', 7, ["optim.lr", "in quotes", "remove the quotes"]),
    "not a whole number": (PPO + "run: {steps: 1e3}\n", 7, ["run.steps", "a whole number", "write 1000"]),
    "infinite": (PPO + "kl: {target: .inf}\n", 7, ["kl.target", "found inf"]),
    "too large to be finite": (PPO + "optim: {lr: 1e999}\n", 7, ["optim.lr", "found inf"]),
    "nan": (PPO + "kl: {beta: .nan}\n", 7, ["kl.beta", "found nan"]),
    "octal": (PPO + "run: {seed: 010}\n", 7, ["run.seed", '"010"', "without leading zeros"]),
    "sexagesimal": (PPO + "run: {steps: 1:30}\n", 7, ["run.steps", '"1:30"', "plain decimal digits"]),
    "yes": (PPO + "kl: {exact: yes}\n", 7, ["kl.exact", "wanted true or false", "write true"]),
    "Off": (PPO + "model2: 1\nkl: {exact: Off}\n", 8, ["kl.exact", "write false"]),
    "wrong choice": (PPO + "kl: {control: traget}\n", 7, ["kl.control", "fixed or target", "did you mean target?"]),
    "Python's None": (PPO + "kl: {hard_cap: None}\n", 7, ["kl.hard_cap", "write null"]),
    "number for text": (PPO.replace("base", "7"), 2, ["model.path", "found 7", "put it in quotes"]),
    "empty section": (PPO + "kl:\n", 7, ["kl:", "nothing (null)", "remove the line"]),
    "list for a section": (PPO + "kl: [1]\n", 7, ["kl:", "a list of 1", "a section"]),
    "no model": (PPO.replace("model: {path: base}", ""), 1, ["model", "missing"]),
    "no model path": (PPO.replace("{path: base}", "{dtype: auto}"), 2, ["model.path", "missing"]),
    "key given twice": (PPO + "kl: {target: 3}\nkl: {target: 4}\n", 8, ["kl", "given twice", "line 7"]),
    "float16": (PPO.replace("{path: base}", "{path: base, dtype: float16}"), 2, ["bfloat16", "gradients below 6e-8"]),
    "nothing to keep": (PPO.replace("base}", "base, merge: false}"), 2, ["model.merge", "nothing to keep"]),
    "greedy": (PPO + "sampling: {temperature: 0}\n", 7, ["sampling.temperature", "at least 0.1", "greedy"]),
    # names from elsewhere
    "init_kl_coef": (PPO + "init_kl_coef: 0.2\n", 7, ["init_kl_coef", "kl.beta"]),
    "target_kl": (PPO + "ppo: {target_kl: 6}\n", 7, ["kl.target", "ppo.stop_step_kl"]),
    "learning_rate": (PPO + "learning_rate: 1e-5\n", 7, ["optim.lr"]),
    "top_p": (PPO + "sampling: {top_p: 0.9}\n", 7, ["sampling.top_p", "whole distribution", "remove it"]),
    "top_k": (PPO + "sampling: {top_k: 50}\n", 7, ["whole distribution"]),
    "min_p": (PPO + "sampling: {min_p: 0.1}\n", 7, ["whole distribution"]),
    "repetition_penalty": (PPO + "sampling: {repetition_penalty: 1.1}\n", 7, ["whole distribution"]),
    "lora.bias": (PPO + "lora: {bias: all}\n", 7, ["lora.bias", "no longer be the reference"]),
    "modules_to_save": (PPO + "lora: {modules_to_save: [lm_head]}\n", 7, ["no longer be the reference"]),
    "init_lora_weights": (PPO + "lora: {init_lora_weights: pissa}\n", 7, ["no longer be the reference"]),
    "lora_r": (PPO + "lora_r: 8\n", 7, ["lora.rank"]),
    "num_train_epochs": (PPO + "num_train_epochs: 3\n", 7, ["run.epochs"]),
    "per_device_train_batch_size": (PPO + "per_device_train_batch_size: 3\n", 7, ["sampling.prompts_per_step"]),
    "key of another section": (PPO + "ppo: {max_new_tokens: 64}\n", 7, ["another section", "sampling.max_new_tokens"]),
    "section of another stage": (PPO + "dpo: {beta: 0.1}\n", 7, ["the ppo stage does not read this section", "dpo"]),
    "key the stage does not read": (PPO + "optim: {batch_size: 8}\n", 7, ["optim.batch_size", "prompts_per_step"]),
    "rows of another stage": (PPO.replace("data:", "data:\n  texts: a.jsonl"), 4, ["data.texts", "data.prompts"]),
    # keys that do not fit together
    "layers": (PPO + "lora: {layers: 1.5}\n", 7, ["lora.layers"]),
    "dropout": (PPO + "lora: {dropout: 0.1}\n", 7, ["lora.dropout", "found 0.1", "wanted 0", "noise"]),
    "auto price in plain dpo": (DPO + "kl: {control: fixed}\n", 4, ["kl.beta", "found auto", "0 for plain DPO"]),
    "a price in the reward of dpo": (DPO + "kl: {placement: reward}\n", 4, ["kl.placement", "wanted loss"]),
    "layers of no value function": (
        PPO + "ppo: {baseline: value, value_layers: 0.5}\n", 7, ["ppo.value_layers", "value_function: upper"]),
    "a value function's key without one": (
        PPO + "sampling: {responses_per_prompt: 4}\nppo: {value_function: head, value_coef: 0.5}\n", 8,
        ["ppo.value_coef", "baseline rloo has no value function", "write baseline: value"]),
    "another loss's key": (DPO + "dpo: {gap: 2.0}\n", 4, ["dpo.gap", "read only by loss simpo"]),
    "a dynamic beta of another loss": (
        DPO + "dpo: {loss: ipo, dynamic_beta: 0.6}\n", 4, ["dpo.dynamic_beta", "read only by loss sigmoid"]),
    "a negative dynamic beta": (DPO + "dpo: {dynamic_beta: -0.6}\n", 4, ["dpo.dynamic_beta"]),
    "a reference moved for simpo": (
        DPO + "dpo: {loss: simpo, reference_alpha: 0.6}\n", 4, ["dpo.reference_alpha", "simpo knows no reference"]),
    "a reference that goes nowhere": (DPO + "dpo: {reference_alpha: 0}\n", 4, ["dpo.reference_alpha", "above 0"]),
    "a reference moved beyond": (DPO + "dpo: {reference_alpha: 1.5}\n", 4, ["dpo.reference_alpha", "1"]),
    "moves of no reference": (
        DPO + "dpo: {reference_every: 512}\n", 4, ["dpo.reference_every", "found 512", "dpo.reference_alpha"]),
    "robust without a share": (DPO + "dpo: {loss: robust}\n", 4, ["dpo.label_smoothing", "it is loss: sigmoid"]),
    "alpha unread": (DPO + "dpo: {loss: f_dpo, alpha: 0.7}\n", 4, ["dpo.alpha", "found forward_kl"]),
    "alpha 1": (DPO + "dpo: {loss: f_dpo, divergence: alpha, alpha: 1.0}\n", 4, ["dpo.alpha", "loss: sigmoid"]),
    "kto of one": (DPO + "dpo: {loss: kto}\noptim: {batch_size: 1}\n", 5, ["optim.batch_size", "at least 2"]),
    "dpo without exact": (DPO + "kl: {exact: false}\n", 4, ["kl.exact", "wanted true"]),
    # online dpo
    "pairs of a file, online": (ONLINE.replace("prompts.jsonl", "a, pairs: b.jsonl"), 3, ["data.pairs", "data.prompt"]),
    "one response makes no pair": (ONLINE.replace("prompt: 4", "prompt: 1"), 4, ["at least 2", "two responses"]),
    "batch size online": (ONLINE + "optim: {batch_size: 8}\n", 8, ["optim.batch_size", "source: file"]),
    "labels online": (ONLINE.replace("online", "online, loss: kto"), 5, ["dpo.loss", "wanted a loss of pairs"]),
    "reference's own, online": (ONLINE.replace("online", "online, from_reference: true"), 5, ["the policy's"]),
    "preferences and scores": (ONLINE + "  - {kind: model, path: rm}\n", 7, ["reward.0.mode", "wanted it alone"]),
    "weight of a preference": (ONLINE.replace("pair}", "pair, weight: 2.0}"), 7, ["reward.0.weight", "mode: score"]),
    "penalty on a preference": (ONLINE.replace("prompt: 4", "prompt: 4, missing_end_penalty: 1"), 4, ["mode: pair"]),
    "penalty in dpo": (DPO + "sampling: {missing_end_penalty: 1.0}\n", 4, ["sampling.missing_end_penalty"]),
    "pairs held out in ppo": (PPO + "eval: {pairs: p.jsonl}\n", 7, ["eval.pairs", "does not read it"]),
    "dropout in dpo": (DPO + "lora: {dropout: 0.1}\n", 4, ["lora.dropout", "wanted 0"]),
    "target without a target": (PPO + "kl:\n  control: target\n  target: null\n", 9, ["kl.target", "control: target"]),
    "fixed without a price": (PPO + "kl: {control: fixed}\n", 7, ["kl.beta", "control: fixed", "wanted a number"]),
    "negative price": (PPO + "kl: {control: fixed, beta: -0.1}\n", 7, ["kl.beta", "at least 0"]),
    "bounds crossed": (PPO + "kl: {beta_min: 2, beta_max: 1}\n", 7, ["kl.beta_min", "less than kl.beta_max"]),
    "price out of bounds": (PPO + "kl: {beta: 5000}\n", 7, ["kl.beta", "between kl.beta_min"]),
    "steered price from zero": (PPO + "kl: {beta: 0}\n", 7, ["kl.beta", "between kl.beta_min"]),
    "what happens at no cap": (PPO + "kl: {on_cap: stop}\n", 7, ["kl.on_cap", "only with kl.hard_cap"]),
    "cap without exact KL": (PPO + "kl: {hard_cap: 9, exact: false}\n", 7, ["kl.hard_cap", "against the exact KL"]),
    "cap below target": (PPO + "kl: {target: 6, hard_cap: 5}\n", 7, ["kl.hard_cap", "more than kl.target, 6"]),
    "token unit, response target": (PPO + "kl: {unit: nats_per_token}\n", 7, ["kl.target", "nats_per_token"]),
    "rloo alone": (PPO + "ppo: {baseline: rloo}\n", 7, ["sampling.responses_per_prompt", "at least 2", "rloo"]),
    "grpo alone": (PPO + "sampling: {responses_per_prompt: 1}\nppo: {baseline: grpo}\n", 7, ["at least 2", "grpo"]),
    "minibatch too large": (PPO + "ppo: {minibatch_size: 128}\n", 7, ["ppo.minibatch_size", "divisor of the 64"]),
    "minibatch no divisor": (PPO + "ppo: {minibatch_size: 48}\n", 7, ["found 48", "divisor of the 64"]),
    "k1 as a loss": (PPO + "kl: {placement: loss, estimator: k1}\n", 7, ["kl.estimator", "gradient of exactly zero"]),
    "k2 in the reward": (PPO + "kl: {estimator: k2}\n", 7, ["k2", "placement reward", "write k1"]),
    "exact in the reward": (PPO + "kl: {estimator: exact}\n", 7, ["exact", "placement reward", "write k1"]),
    "k3 in the reward": (PPO + "kl: {estimator: k3}\n", 7, ["k3", "uphill"]),
    "k3 as a loss": (PPO + "kl: {placement: loss, estimator: k3}\n", 7, ["k3", "forward KL"]),
    "gain of another controller": (PPO + "kl: {horizon: 5000}\n", 7, ["kl.horizon", "ziegler", "log_pi"]),
    "warm-up longer than the run": (PPO + "run: {steps: 5}\noptim:\n  warmup_steps: 6\n", 9, ["at most run.steps, 5"]),
    "steps and epochs": (PPO + "run: {steps: 5, epochs: 1}\n", 7, ["run.steps", "wanted one of them"]),
    "neither steps nor epochs": (PPO + "run: {steps: null}\n", 7, ["run.steps", "wanted one of them"]),
    "no prompts": (PPO.replace("prompts: prompts.jsonl", "template: auto"), 4, ["data.prompts", "missing"]),
    "no texts": ("stage: sft\nmodel: {path: base}\n", 1, ["data.texts", "missing"]),
    "no pairs": ("stage: dpo\nmodel: {path: base}\n", 1, ["data.pairs", "missing"]),
    "no pairs for a reward model": ("stage: reward\nmodel: {path: base}\n", 1, ["data.pairs", "missing"]),
    "online without prompts": ("stage: dpo\nmodel: {path: base}\ndpo: {source: online}\n", 1, ["data.prompts"]),
    "online without a reward": (DPO.replace("pairs", "prompts") + "dpo: {source: online}\n", 1, ["reward", "missing"]),
    "no reward": (PPO[: PPO.index("reward")] + "reward: []\n", 5, ["reward", "missing", "rewards.py:score"]),
    "reward read by nobody": (DPO + "reward: [{kind: model, path: rm}]\n", 4, ["reward", "online"]),
    "lora null in ppo": (PPO + "lora: null\n", 7, ["lora", "nothing (null)"]),
    # reward functions
    "unknown kind": (PPO.replace("function,", "functon,"), 6, ["reward.0.kind", "did you mean function?"]),
    "no such kind": (PPO.replace("function,", "oracle,"), 6, ["reward.0.kind", "function, model, classifier or judge"]),
    # AI judges
    "judge without a model": (JUDGED.replace("model: m, ", ""), 6, ["reward.0.model", "missing"]),
    "judge's model no text": (JUDGED.replace("model: m", "model: 7"), 6, ["reward.0.model", "found 7", "in quotes"]),
    "judge with a path": (JUDGED.replace("model: m", "model: m, path: m"), 6, ["reward.0.path", "unknown key"]),
    "no web address": (JUDGED.replace("http:", "ftp:"), 6, ["reward.0.url", "wanted an address such as http://"]),
    "no port": (JUDGED.replace(":8000", ":80000"), 6, ["reward.0.url", "wanted an address"]),
    "whole address": (JUDGED.replace("/v1", "/v1/chat/completions"), 6, ["reward.0.url", "which kltune adds"]),
    "password in the address": (JUDGED.replace("127", "me:hunter2@127"), 6, ["reward.0.url", "key_env"]),
    "key in the clear": (JUDGED.replace("127.0.0.1", "judge.example").replace("m,", "m, key_env: MY_KEY,"), 6,
                         ["reward.0.key_env", "can be read on its way", "https://"]),
    "any variable as a key": (JUDGED.replace("m,", "m, key_env: HOME,"), 6, ["reward.0.key_env", "ending in KEY"]),
    "range upside down": (JUDGED.replace("m,", "m, lowest: 10,"), 6, ["reward.0.lowest", "less than highest, 10"]),
    "preferences in ppo": (JUDGED.replace("score", "pair"), 6, ["reward.0.mode", "wanted score", "online"]),
    "a peak without gold": (PPO + "eval: {stop_at_gold_peak: true}\n", 7,
                            ["eval.stop_at_gold_peak", "without eval.gold"]),
    "gold preferences": (PPO + "eval: {gold: {kind: judge, url: 'http://a/v1', model: m, mode: pair}}\n", 7,
                         ["eval.gold.mode", "wanted score"]),
    "no kind": (PPO.replace("kind: function, ", ""), 6, ["reward.0.kind", "missing"]),
    "reward not a list": (PPO.replace("  - {kind: function, ", "  {kind: function, "), 6, ["reward", "with a dash"]),
    "dotted path": (PPO.replace("rewards.py:score", "os.system"), 6, ["reward.0.path", "file.py:function"]),
    "function above the recipe": (PPO.replace("rewards.py", "../rewards.py"), 6, ["the recipe's own folder"]),
    "function elsewhere": (PPO.replace("rewards.py", "/usr/lib/os.py"), 6, ["the recipe's own folder"]),
    "function behind a link": (PPO.replace("rewards.py", "linked.py"), 6, ["the recipe's own folder"]),
    "address": (PPO.replace("prompts.jsonl", "https://host/p.jsonl"), 4, ["data.prompts", "download it first"]),
    # YAML itself
    "wrong stage": (PPO.replace("ppo", "poo"), 1, ["stage", "did you mean ppo?"]),
    "no stage": (PPO.replace("stage: ppo\n", ""), 1, ["stage", "missing"]),
    "empty": ("# nothing\n", 1, ["an empty file"]),
    "list on top": ("- stage: ppo\n", 1, ["a list of 1", "wanted sections"]),
    "text on top": ("ppo\n", 1, ['"ppo"', "wanted sections"]),
    "python tag": (PPO + "kl: !!python/object/apply:os.system [id]\n", 7, ["tag", "plain values only"]),
    "harmless tag": (PPO + "run: {seed: !!int 3}\n", 7, ["tag", "plain values only"]),
    "alias": (PPO + "kl: &kl {target: 3}\neval: *kl\n", 8, ["alias *kl", "write the value out"]),
    "merge key": (PPO + "kl: {<<: {target: 3}}\n", 7, ["<<", "write the values out"]),
    "two documents": (PPO + "---\nstage: sft\n", 7, ["a second document"]),
    "tab": (PPO + "kl:\n\ttarget: 3\n", 8, ["not YAML", "no tabs"]),
    "open bracket": (PPO + "kl: {target: 3\nrun: {steps: 3}\n", 8, ["not YAML"]),
    "deep nesting": (PPO + "kl: " + "[" * 5000, 7, ["nested more than"]),
    "many values": (PPO + "kl: [" + "1, " * 30000 + "1]", 7, ["more than 10,000 values"]),
    "list as a key": (PPO + "? [a]\n: 1\n", 7, ["one plain word"]),
    "NUL": (PPO + "# \0\n", 7, ["NUL"]),
    "NUL by escape": (PPO + 'run: {output: "a\\0b"}\n', 7, ["run.output", "\\x00"]),
    "text-direction mark": (PPO + "# \u202e\n", 7, ["text-direction"]),
}


def write(folder: Path, text: str | bytes, name: str = "recipe.yaml") -> Path:
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_answered_with_line_and_words(case, folder, capsys):
    text, line, words = WRONG[case]
    file = write(folder, text)
    with pytest.raises(SystemExit) as left:
        main(["recipe", "check", str(file)])
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert out == ""
    assert "Traceback" not in err
    lines = [fault for fault in err.splitlines() if f"{file}:{line}:" in fault]
    assert any(all(word in fault for word in words) for fault in lines), err


def test_all_faults_come_at_once_in_the_order_of_the_file(folder):
    text = PPO.replace("base", "7") + "kl: {targt: 3, hard_cap: 5, placement: loss, estimator: k1}\n"
    text += "lora: {dropout: 0.1}\n"
    with pytest.raises(RecipeFaults) as caught:
        load_recipe(write(folder, text), overrides=["optim.lr=fast"])
    keys = [fault.key for fault in caught.value.faults]
    assert keys == ["model.path", "kl.targt", "kl.hard_cap", "kl.estimator", "lora.dropout", "optim.lr"]
    assert [fault.place.line for fault in caught.value.faults][:5] == [2, 7, 7, 7, 8]


@pytest.mark.parametrize(("data", "words"), [
    ("stage: ppo # é".encode("latin-1"), "not UTF-8"),
    ("stage: ppo".encode("utf-16"), "not UTF-8"),
    (b"stage: ppo\n#" + b"x" * 1_100_000, "larger than 1 MB"),
])
def test_bytes_that_are_no_recipe_are_refused(data, words, folder):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(folder, data))


@pytest.mark.parametrize(("name", "words"), [("none.yaml", "no such file, and no packaged recipe"), (".", "a folder")])
def test_a_missing_file_and_a_folder_are_refused(name, words, folder):
    with pytest.raises(RecipeError, match=words):
        load_recipe(folder / name)


TEXTS = ("010", "0x10", "0o17", "1_000", "1:30", "2024-01-01", "yes", "No", "on", "1e", "=")


@pytest.mark.parametrize(("text", "value"), [
    ("1e-5", 1e-5), ("5e-3", 5e-3), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-2", -2), ("+3", 3), ("1.0e-4", 1e-4),
    *zip(TEXTS, TEXTS, strict=True),
])
def test_numbers_are_those_of_yaml_1_2_and_all_else_is_text(text, value):
    assert resolve(text) == value


def test_an_int_serves_as_a_float_and_defaults_are_the_contracts(folder):
    recipe = load_recipe(write(folder, PPO + "optim: {lr: 1e-5}\nkl: {target: 4}\n"))
    assert isinstance(recipe, PPORecipe)
    assert recipe.optim.lr == 1e-5
    assert recipe.kl.target == 4.0
    assert isinstance(recipe.kl.target, float)
    assert (recipe.kl.control, recipe.kl.beta, recipe.kl.unit) == ("target", "auto", "nats_per_response")
    assert (recipe.kl.estimator, recipe.kl.controller, recipe.kl.on_cap) == ("k1", "log_pi", "rollback")
    assert (recipe.lora.rank, recipe.lora.alpha, recipe.lora.targets) == (16, 32.0, "all-linear")
    assert (recipe.sampling.prompts_per_step, recipe.sampling.max_new_tokens) == (64, 128)
    assert (recipe.run.steps, recipe.run.epochs, recipe.run.save_every) == (100, None, 20)
    assert (recipe.ppo.minibatch_size, recipe.ppo.gae_lambda, recipe.optim.micro_batch_size) == (64, 0.95, None)


def test_defaults_follow_the_keys_they_depend_on(folder):
    text = PPO + "kl: {placement: loss}\nsampling: {prompts_per_step: 96}\nrun: {epochs: 2}\n"
    recipe = load_recipe(write(folder, text))
    assert recipe.kl.estimator == "exact"
    assert recipe.ppo.minibatch_size == 48      # the largest divisor of 96 up to 64
    assert (recipe.run.epochs, recipe.run.steps) == (2.0, None)


@pytest.mark.parametrize("text", [
    "kl: {control: fixed, beta: 0}", "kl: {control: fixed, beta: 0.1, target: null}",
    "kl: {placement: loss, estimator: k2}",
    "kl: {target: 6, hard_cap: 7}", "kl: {controller: ziegler, horizon: 5000, beta: 0.15}", "lora: {targets: [q_proj]}",
    "kl: {control: fixed, beta: 1, hard_cap: 3}", "kl: {unit: nats_per_token, target: 0.05}", "run: {device: 'cuda:1'}",
    "ppo: {baseline: rloo, minibatch_size: 16}\nsampling: {prompts_per_step: 8, responses_per_prompt: 4}",
])
def test_these_fit_together(text, folder):
    section = text.partition(":")[0]
    recipe = load_recipe(write(folder, PPO + text + "\n"))
    assert getattr(recipe, section).model_fields_set  # what was written has been read


def test_full_fine_tuning_and_dropout_are_for_sft_where_no_logprobs_are_compared(folder):
    recipe = load_recipe(write(folder, SFT + "lora: null\n"))
    assert isinstance(recipe, SFTRecipe)
    assert recipe.lora is None
    assert load_recipe(write(folder, SFT + "lora: {dropout: 0.1}\n")).lora.dropout == 0.1


# --set


def test_overrides_are_typed_and_the_last_one_wins(folder):
    text = PPO + "kl: {target: 4}\n"
    sets = ["kl.target=3", "kl.target=2.5", "optim.lr=5e-3", "reward.0.weight=2", "lora.targets=[q_proj, v_proj]",
            "run.output=a=b", "kl.exact=false", "eval.gold={kind: model, path: gold}"]
    recipe = load_recipe(write(folder, text), overrides=sets)
    assert recipe.kl.target == 2.5
    assert recipe.optim.lr == 0.005
    assert recipe.reward[0].weight == 2.0
    assert recipe.lora.targets == ("q_proj", "v_proj")
    assert recipe.run.output == str(folder / "a=b")
    assert recipe.kl.exact is False
    assert recipe.eval.gold.kind == "model"


@pytest.mark.parametrize(("override", "words"), [
    ("kl.target=abc", ["--set kl.target=abc", 'found "abc"', "wanted a number above 0"]),
    ('kl.target="4"', ["in quotes", "remove the quotes"]),
    ("kl.targt=4", ["--set kl.targt=4", "did you mean target?"]),
    ("kl.target", ["--set kl.target", "wanted section.key=value"]),
    ("=4", ["wanted section.key=value"]),
    ("kl..target=4", ["wanted section.key=value"]),
    ("reward.7.weight=2", ["reward.7", "a list of 1", "counted from 0"]),
    ("reward.weight=2", ["reward.weight", "a list of 1"]),
    ("model.path.x=2", ["model.path.x", "cannot be set"]),
    ("kl.target=[1", ["--set kl.target=[1", "not YAML"]),
    ("kl.target=!!python/name:os.system", ["tag"]),
    ("kl.hard_cap=5", ["--set kl.hard_cap=5", "more than kl.target, 6"]),
    ("kl.target=\0", ["NUL"]),
    ("data.prompts=b\udcff", ["--set data.prompts=b", "not UTF-8"]),
])
def test_a_wrong_override_is_named(override, words, folder):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, PPO), overrides=[override])
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_scorer_on_the_command_line():
    assert [read_scorer(text).kind for text in ("rewards.py:gold", "runs/reward/final")] == ["function", "model"]
    entry = read_scorer("{kind: classifier, path: some/model, label: POSITIVE}")
    assert (entry.kind, entry.label) == ("classifier", "POSITIVE")


@pytest.mark.parametrize(
    "text", ["{kind: oracle}", "{kind: model}", "{kind: model, path: x, typo: 1}", "{", "{kind: &a model, path: x}"]
)
def test_a_scorer_that_is_none(text):
    with pytest.raises(RecipeError):
        read_scorer(text)


# stage, output, paths


def test_the_command_and_the_file_must_name_the_same_stage(folder):
    file = write(folder, SFT)
    assert load_recipe(file, stage="sft").stage == "sft"
    with pytest.raises(RecipeError, match="found sft, but the command is kltune ppo"):
        load_recipe(file, stage="ppo")


def test_a_pipe_is_read_once_and_says_the_same_each_time(folder):
    reader, writer = os.pipe()
    os.write(writer, SFT.replace("base", "/base").replace("texts.jsonl", "/texts.jsonl").encode())
    os.close(writer)
    both = [load_recipe(f"/dev/fd/{reader}") for _ in range(2)]
    os.close(reader)
    assert both[0] == both[1]
    assert both[0].model.path == "/base"


@pytest.mark.parametrize("place", ["recipe", "output"])
def test_a_folder_that_is_not_utf8_is_named(place, folder, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    odd.mkdir()
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load_recipe(write(odd if place == "recipe" else folder, SFT), output=str(odd) if place == "output" else None)


def test_paths_start_at_the_recipe_and_output_at_the_current_folder(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (folder / "base").mkdir()
    file = write(folder, PPO + "eval: {prompts: ../held_out.jsonl, gold: {kind: model, path: org/name}}\n", "ours.yaml")
    recipe = load_recipe(Path("project/ours.yaml"))
    assert recipe.folder == folder
    assert recipe.model.path == str(folder / "base")
    assert recipe.data.prompts == str(folder / "prompts.jsonl")
    assert recipe.eval.prompts == str(tmp_path / "held_out.jsonl")
    assert recipe.eval.gold.path == "org/name"            # no path here, so it may be a hub name
    assert recipe.reward[0].path == f"{folder}/rewards.py:score"
    assert recipe.run.output == str(folder / "runs" / "ours")
    assert load_recipe(file, output="elsewhere").run.output == str(tmp_path / "elsewhere")


def test_a_model_that_lies_in_the_current_folder_only_is_pointed_at(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2:.* paths start at the recipe: write \.\./base"):
        load_recipe(write(folder, PPO))


def test_every_packaged_recipe_loads():
    # one test over all of them: a folder without recipes is a pass here, and test_cli runs them by name
    files = sorted(recipes_folder().rglob("*.yaml"))
    assert list(packaged_recipes().values()) == files
    for name in packaged_recipes():
        recipe = load_recipe(name)
        assert recipe.run.output.startswith(str(Path.cwd()))
        assert recipe == load_recipe(name, stage=recipe.stage)


# whatever is done to a recipe, it is read or refused


def mutate(text: str, rng: random.Random) -> str:
    """One small accident: a line lost, doubled or moved, or characters changed."""
    lines = text.split("\n")
    spot = rng.randrange(len(lines))
    match rng.randrange(5):
        case 0:
            del lines[spot]
        case 1:
            lines.insert(rng.randrange(len(lines)), lines[spot])
        case 2:
            lines[spot] = " " * rng.randrange(4) + lines[spot]
        case 3:
            key, colon, _ = lines[spot].partition(":")
            odd = ["yes", "1e-5", "-1", "null", "[]", "{}", "'3'", ".nan", "a: b", "&a 1", "*a", "!x y", "[1, [2]]"]
            lines[spot] = f"{key}{colon} {rng.choice(odd)}"
        case 4:
            at = rng.randrange(len(text))
            return text[:at] + rng.choice("{}[]:,-'\"\n\t#&*!|>%@`\0x0") + text[at + rng.randrange(2):]
    return "\n".join(lines)


def test_random_accidents_are_read_or_refused_with_a_place(folder):
    whole = dump_recipe(load_recipe(write(folder, PPO)))
    rng, refused = random.Random(0), []
    for _ in range(300):
        text = whole
        for _ in range(rng.randrange(1, 4)):
            text = mutate(text, rng)
        file = write(folder, text)
        try:
            load_recipe(file)
        except RecipeFaults as error:
            refused.append(str(error))
    assert len(refused) > 100
    assert all(re.search(r"recipe\.yaml:\d+:\d+: ", message) for message in refused)


def test_faults_travel_between_processes(tmp_path):
    (tmp_path / "r.yaml").write_text("stage: ppo\nmodel: {path: 3}\n")
    with pytest.raises(RecipeFaults) as caught:
        load_recipe(tmp_path / "r.yaml")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.faults) == (str(caught.value), caught.value.faults)
    stopped = pickle.loads(pickle.dumps(Interrupted("stopped after step 3", 15)))
    assert (str(stopped), stopped.exit_code) == ("stopped after step 3", 143)
