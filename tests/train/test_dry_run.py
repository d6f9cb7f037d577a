"""What a dry run tells is what a run takes: memory counted tensor by tensor, rows, steps, and nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedConfig, Qwen3Config

from kltune.cli import main
from kltune.core import products
from kltune.errors import DataError
from kltune.lm.machine.live_bytes import LiveBytes
from kltune.recipe import load_recipe
from kltune.stages.distill import run_distill
from kltune.stages.dpo import run_dpo
from kltune.stages.eval_kl import EvalKLOptions, eval_kl
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo
from kltune.train.evaluation import finish
from kltune.train.plan import plan, plans_for
from tests.tiny_policies import SPECIAL, word_tokenizer

RUN = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "trpo": run_trpo, "dpo": run_dpo, "distill": run_distill}
SAMPLED = "ppo", "trpo", "distill"
PROMPT, RESPONSE = 40, 24


def config(kind: type, hidden: int, layers: int, vocabulary: int, **more) -> PreTrainedConfig:
    """A model of a shape, with a context that takes the rows below."""
    return kind(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=vocabulary,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, head_dim=hidden // 4,
        **SPECIAL, **more,
    )


SHAPES = {
    "wide vocabulary": (config(LlamaConfig, 64, 2, 4000), "float32"),
    "deep": (config(LlamaConfig, 64, 8, 300), "float32"),
    "tied, bfloat16": (config(Qwen3Config, 128, 4, 1000, tie_word_embeddings=True), "bfloat16"),
    "wide": (config(LlamaConfig, 256, 2, 500), "float32"),
    "capped logits": (config(Gemma2Config, 64, 3, 500, final_logit_softcapping=30.0), "float32"),
}


def words(start: int, count: int, vocabulary: int) -> str:
    return " ".join(f"w{3 + (start + 7 * place) % (vocabulary - 3)}" for place in range(count))


def write_recipe(folder: Path, stage: str, shape: str, **sections) -> Path:
    """A stage of two steps on rows of one length, with the model of a shape."""
    made, dtype = SHAPES[shape]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder / "model")
    word_tokenizer(made.vocab_size - 3).save_pretrained(folder / "model")
    prompts = [words(11 * row, PROMPT, made.vocab_size) for row in range(16)]
    answers = [[words(13 * row + side, RESPONSE - 1, made.vocab_size) for side in (0, 5)] for row in range(16)]
    rows = {
        "prompts": [{"prompt": prompt} for prompt in prompts],
        "texts": [{"prompt": prompt, "response": one} for prompt, (one, _) in zip(prompts, answers, strict=True)],
        "pairs": [{"prompt": p, "chosen": a, "rejected": b} for p, (a, b) in zip(prompts, answers, strict=True)],
    }
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rewards.py").write_text("def score(prompts, responses):\n    return [float(len(r)) for r in responses]")
    recipe = {
        "stage": stage, "model": {"path": "model", "dtype": dtype}, "lora": {"rank": 4},
        "data": {"texts": "texts.jsonl"} if stage == "sft" else {"prompts": "prompts.jsonl"} if stage in SAMPLED
        else {"pairs": "pairs.jsonl"},
        "run": {"steps": 2, "eval_every": 100, "output": "run", "loggers": []}, "eval": {},
    }
    if stage != "reward":
        recipe |= {"sampling": {"max_new_tokens": RESPONSE}, "eval": {"prompts": "prompts.jsonl", "responses": 16}}
    if stage in SAMPLED:
        recipe["sampling"] |= {"prompts_per_step": 8, "responses_per_prompt": 2}
    if stage == "distill":
        recipe |= {"distill": {"teacher": "reference", "teacher_prompt": "w5 {prompt}"}}
    elif stage in SAMPLED:
        recipe |= {"reward": [{"kind": "function", "path": "rewards.py:score"}], stage: {"baseline": "rloo"}}
    if stage in ("sft", "reward", "dpo"):
        recipe["optim"] = {"batch_size": 8}
    if stage == "dpo":
        recipe |= {"kl": {"control": "fixed", "beta": 0}}
        recipe["eval"].pop("prompts")
        recipe["sampling"] |= {"prompts_per_step": 8}
    for name, keys in sections.items():
        recipe[name] = recipe.get(name, {}) | keys
    path = folder / f"{stage}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measured_peak(work) -> float:
    """The most bytes of tensors that lived at once while some work was done."""
    with LiveBytes() as live:
        work()
    return live.peak


@pytest.fixture(autouse=True)
def native_half_precision(monkeypatch):
    """Where products are widened, their float32 comes on top, which at these sizes is 6 % and at real ones little."""
    monkeypatch.setattr(products, "WIDENED", set())


FAST = [("deep", "sft"), ("deep", "trpo"), ("tied, bfloat16", "dpo"), ("wide", "ppo")]
EACH = [(shape, stage) for shape in SHAPES for stage in RUN if stage != "distill" and (shape, stage) not in FAST]


@pytest.mark.parametrize(
    ("shape", "stage"), [*FAST, *(pytest.param(*pair, marks=pytest.mark.stress) for pair in EACH)]
)
def test_the_memory_told_is_what_a_run_takes(tmp_path, monkeypatch, shape, stage):
    monkeypatch.setattr(finish, "write_page", lambda folder: None)
    recipe = load_recipe(write_recipe(tmp_path, stage, shape))
    told = plan(recipe)["memory"]
    assert not (tmp_path / "run").exists()
    taken = measured_peak(lambda: RUN[stage](recipe, resume=False))
    assert told["peak"] == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize("shape", ["deep", *(pytest.param(shape, marks=pytest.mark.stress) for shape in SHAPES
                                             if shape != "deep")])
def test_the_memory_told_of_a_measurement_is_what_it_takes(tmp_path, shape):
    write_recipe(tmp_path, "sft", shape)
    made, dtype = SHAPES[shape]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    adapter = get_peft_model(model, LoraConfig(target_modules="all-linear", r=16, init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "adapter")
    # Rows of doctor's usual length, as far as the model's context goes.
    asked = [{"prompt": words(11 * row, 63, made.vocab_size)} for row in range(300)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    options = EvalKLOptions(prompts=str(tmp_path / "many.jsonl"), responses=256, max_new_tokens=64)
    told = dict(plans_for(str(tmp_path / "model")))["eval-kl"]
    taken = measured_peak(lambda: eval_kl([str(tmp_path / "adapter")], options))
    assert told["peak"] == pytest.approx(taken, rel=0.05)


KEEPING = {     # hidden states of a step's responses
    "distill": ("distill", {}),
    "the KL in ppo's loss": ("ppo", {"kl": {"placement": "loss"}}),
    "the KL of dpo": ("dpo", {"kl": {"control": "target", "target": 3, "beta": "auto"}}),
    "lower layers without adapters": ("ppo", {"lora": {"layers": 0.5}}),
    "a value head": ("ppo", {"ppo": {"baseline": "value", "value_function": "head"}}),
    "a value function above": ("ppo", {"ppo": {"baseline": "value", "value_function": "upper", "value_layers": 0.5}}),
}


@pytest.mark.parametrize("shape", ["deep", *(pytest.param(shape, marks=pytest.mark.stress) for shape in SHAPES
                                             if shape != "deep")])
@pytest.mark.parametrize("keeping", KEEPING)
def test_the_memory_told_has_what_a_step_keeps(tmp_path, monkeypatch, shape, keeping):
    monkeypatch.setattr(finish, "write_page", lambda folder: None)
    stage, sections = KEEPING[keeping]
    recipe = load_recipe(write_recipe(tmp_path, stage, shape, **sections))
    told, taken = plan(recipe)["memory"], measured_peak(lambda: RUN[stage](recipe, resume=False))
    assert told["peak"] == pytest.approx(taken, rel=0.05)


def test_a_teachers_prompt_is_counted_and_one_that_cannot_be_written_is_refused(tmp_path):
    told = plan(load_recipe(write_recipe(tmp_path, "distill", "wide")))
    assert told["tokens"]["per_step"] == 16 * (PROMPT + 1 + RESPONSE)       # it has a word more
    path = write_recipe(tmp_path, "distill", "wide", distill={"teacher_prompt": "{hint} {prompt}"})
    with pytest.raises(DataError, match="no field 'hint'"):
        plan(load_recipe(path))


def test_a_dry_run_says_what_would_be_done_and_leaves_nothing(tmp_path, capsys):
    path = write_recipe(tmp_path, "ppo", "deep", run={"steps": 4}, optim={"micro_batch_size": 4})
    files = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as left:
        main(["ppo", str(path), "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert left.value.code == 0
    assert sorted(tmp_path.rglob("*")) == files
    assert (told["schema"], told["stage"], told["steps"], told["device"]) == ("kltune.plan/1", "ppo", 4, "cpu")
    assert told["rows"]["data.prompts"] == {"read": 16, "kept": 16, "truncated": 0, "dropped": 0, "skipped": 0}
    assert told["tokens"] == {"per_step": 16 * (PROMPT + RESPONSE), "total": 64 * (PROMPT + RESPONSE)}
    memory = told["memory"]
    assert memory["phases"].keys() == {"train", "sample", "measure"}
    assert memory["fits"]
    assert (memory["trained_at_once"], memory["tokens_of_a_row"]) == (4, PROMPT + RESPONSE)
    assert memory["peak"] == memory["held"] + max(memory["phases"].values())
    assert "memory_fraction: 0.8" in told["recipe"]     # every default written out
    with pytest.raises(SystemExit):
        main(["ppo", str(path), "--dry-run"])
    text = capsys.readouterr().out
    assert "data.prompts: 16 of 16 rows" in text
    assert "4 steps, 2 times through the rows" in text
    assert "fits: " in text


def test_what_does_not_fit_is_said_and_as_many_rows_as_do_are_named(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, "sft", "deep"))
    whole, little = (plan(recipe, there=there)["memory"] for there in (1e9, 10e6))
    assert whole["fits"]
    assert not little["fits"]       # responses of 16 prompts are not drawn within 8 MB
    assert little["trained_at_once"] < whole["trained_at_once"] == 8
    assert 8 < whole["largest_micro_batch"] < 1000
    fits = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={
        "batch_size": whole["largest_micro_batch"], "micro_batch_size": whole["largest_micro_batch"],
        "checkpoint_layers": "never"})})
    assert plan(fits, there=1e9)["memory"]["peak"] == pytest.approx(0.8e9, rel=0.05)


def test_checkpointed_layers_take_less(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, "sft", "deep"))
    always = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"checkpoint_layers": "always"})})
    kept, again = (plan(one)["memory"] for one in (recipe, always))
    assert again["checkpointed"]
    assert again["phases"]["train"] < 0.5 * kept["phases"]["train"]


def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys):
    path = write_recipe(tmp_path, "sft", "deep", data={"texts": "nowhere.jsonl"})
    with pytest.raises(SystemExit) as left:
        main(["sft", str(path), "--dry-run"])
    assert left.value.code == 5
    assert "nowhere.jsonl" in capsys.readouterr().err
