"""``kltune sft``: what it learns from, what it measures, and what it saves; held against plain transformers."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.lm.data.examples import RowRules, load_examples
from kltune.lm.model.opening import load_policy
from kltune.recipe import SFTRecipe
from kltune.run.optimizer import make_optimizer
from kltune.stages.sft import imitate, run_sft
from kltune.train.evaluation.held_out import EVALUATION_SEED
from kltune.train.learner import Learner
from tests.stages.conftest import SFT, ran, read_jsonl, rows_of, write_recipe


def nats_by_hand(model: torch.nn.Module, tokenizer, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Σ −log p of the response tokens and of the end token, text by text, and how many they are."""
    nats, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = [*tokenizer(row["response"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([-100] * len(prompt) + response)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        nats += cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100).item()
        tokens += len(response)
    return nats, tokens


def plain(recipe: SFTRecipe) -> tuple[torch.nn.Module, object]:
    """The recipe's base and tokenizer, loaded by transformers alone."""
    path = recipe.model.path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def test_the_loss_falls_and_everything_is_measured(sft_recipe):
    recipe = sft_recipe("run.steps=15", "run.eval_every=5", "run.save_every=5")
    result, rows = ran(recipe)
    saved = json.loads((Path(recipe.run.output) / "checkpoints" / "step-000010" / "kltune.json").read_text())
    assert saved["kl"]["nats_per_response"] == rows[9]["eval/kl_ref_nats_per_response"] > 0.0
    assert all(row["kl/ref_nats_per_response"] is row["time/sample_seconds"] is None for row in rows)
    losses = [row["loss/mean"] for row in rows]
    assert losses[-1] < 0.8 * losses[0]
    assert [row["step"] for row in rows if row.get("eval/perplexity") is not None] == [5, 10]
    assert result["status"] == "finished"
    assert result["target"] is None
    assert result["kl"]["nats_per_response"] > 0.1  # a supervised stage moves a model too
    assert result["kl"]["prompts"] == 10
    assert result["eval"]["eval/texts_nats_per_token"] < result["eval"]["eval/reference_texts_nats_per_token"]
    assert result == json.loads((Path(recipe.run.output) / "result.json").read_text())


def test_the_first_loss_is_that_of_the_responses_alone(sft_recipe):
    recipe = sft_recipe("optim.batch_size=12", "run.steps=1")
    run_sft(recipe, resume=False)
    model, tokenizer = plain(recipe)
    nats, tokens = nats_by_hand(model, tokenizer, read_jsonl(Path(recipe.data.texts)))
    (row,) = rows_of(recipe)
    assert row["sft/tokens"] == tokens
    assert row["loss/mean"] == pytest.approx(nats / tokens, abs=1e-5)


@pytest.mark.parametrize("micro", [None, 5])
def test_the_gradient_is_that_of_the_response_tokens_alone(sft_recipe, micro):
    # By hand through transformers: labels −100 on every prompt token, one text at a time, mean over all that is scored.
    recipe = sft_recipe("lora.targets=[q_proj]", f"optim.micro_batch_size={micro or 'null'}", "optim.max_grad_norm=1e9")
    torch.manual_seed(0)
    policy = load_policy(recipe.model, recipe.lora, device=torch.device("cpu"))
    examples, _ = load_examples(recipe.data.texts, policy.tokenizer, RowRules(20, 20, end_token=1))
    tokens = sum(sum(example.scored) for example in examples)
    parameters = policy.trainable_parameters()
    for example in examples:
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor(example.scored), ids[0], -100)
        logits = policy.model(input_ids=ids).logits[0, :-1]
        (cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100) / tokens).backward()
    by_hand = {name: parameter.grad.clone() for name, parameter in parameters.items()}

    class Kept(torch.optim.SGD):
        """Takes no step, and keeps the gradients it was given."""

        def step(self) -> None:
            self.kept = {name: parameter.grad.clone() for name, parameter in parameters.items()}

    optimizer = Kept(parameters.values(), lr=1.0)
    optimizer.zero_grad()
    imitate(recipe, Learner(policy, {"policy": optimizer}), examples, range(len(examples)))
    assert max(grad.abs().max().item() for grad in by_hand.values()) > 1e-3
    for name, grad in by_hand.items():
        assert torch.allclose(optimizer.kept[name], grad, atol=1e-6), name


def test_perplexity_on_held_out_texts_is_the_one_transformers_gives(sft_recipe):
    recipe = sft_recipe("run.steps=3")
    result = run_sft(recipe, resume=False)
    base, tokenizer = plain(recipe)
    rows = read_jsonl(Path(recipe.eval.texts))
    before, tokens = nats_by_hand(base, tokenizer, rows)
    assert result["eval"]["eval/reference_texts_nats_per_token"] == pytest.approx(before / tokens, abs=1e-5)
    after, _ = nats_by_hand(PeftModel.from_pretrained(base, result["final"]).eval(), tokenizer, rows)
    assert result["eval"]["eval/texts_nats_per_token"] == pytest.approx(after / tokens, abs=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(after / tokens), rel=1e-5)


def test_an_epoch_is_every_text_once(sft_recipe):
    recipe = sft_recipe("run.epochs=1", "run.steps=null", "optim.batch_size=5")
    assert run_sft(recipe, resume=False)["steps"] == 3  # 12 texts in batches of 5


def test_without_held_out_prompts_the_kl_is_unmeasured_and_not_zero(tmp_path, llama):
    from kltune.recipe import load_recipe

    result, _ = ran(load_recipe(write_recipe(tmp_path / "sft", SFT | {"eval": {}}, llama), ["run.steps=1"]))
    assert result["kl"] is None
    assert result["perplexity"] is None


def test_an_sft_adapter_becomes_part_of_the_reference_of_the_next_stage(sft_recipe, ppo_recipe):
    from kltune.stages.ppo import run_ppo

    sft = run_sft(sft_recipe("run.steps=3"), resume=False)
    recipe = ppo_recipe(f"model.sft_adapter={sft['final']}", "run.steps=2")
    result = run_ppo(recipe, resume=False)
    first, _ = rows_of(recipe)
    assert first["kl/ref_nats_per_response"] == 0.0
    assert result["reference"]["sft_adapter"] == sft["final"]
    assert result["reference"]["sha256"] != sft["reference"]["sha256"]


# --- full fine-tuning -------------------------------------------------------------------------------------------------


def test_full_fine_tuning_saves_a_model_that_eval_kl_measures(sft_recipe, eval_kl):
    recipe = sft_recipe("lora=null", "optim.lr=2e-3", "run.steps=8")
    result = run_sft(recipe, resume=False)
    losses = [row["loss/mean"] for row in rows_of(recipe)]
    assert losses[-1] < losses[0]

    final = Path(result["final"])
    assert not (final / "adapter_config.json").exists()
    assert {path.name for path in final.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    rows = read_jsonl(Path(recipe.eval.texts))
    saved, tokenizer = AutoModelForCausalLM.from_pretrained(final).eval(), AutoTokenizer.from_pretrained(final)
    nats, tokens = nats_by_hand(saved, tokenizer, rows)
    assert result["eval"]["eval/texts_nats_per_token"] == pytest.approx(nats / tokens, abs=1e-5)

    code, document, _ = eval_kl(recipe.run.output, "--responses", 10, "--seed", EVALUATION_SEED)
    assert code == 0
    assert document["reference"]["sha256"] == result["reference"]["sha256"]
    assert document["kl"]["exact"]["nats_per_response"] == pytest.approx(result["kl"]["nats_per_response"], abs=1e-6)
    assert document["kl"]["exact"]["nats_per_response"] > 0.01


def test_full_fine_tuning_trains_every_weight_and_leaves_the_reference_alone(sft_recipe):
    recipe = sft_recipe("lora=null", "optim.lr=1e-2")
    policy = load_policy(recipe.model, None, device=torch.device("cpu"))
    base, _ = plain(recipe)
    examples, _ = load_examples(recipe.data.texts, policy.tokenizer, RowRules(20, 20, end_token=1))
    optimizer = make_optimizer(policy.trainable_parameters(), recipe.optim, "model")
    imitate(recipe, Learner(policy, {"policy": optimizer}), examples, range(len(examples)))
    for name, tensor in base.state_dict().items():
        assert not torch.equal(policy.model.state_dict()[name], tensor), f"{name} was not trained"
        assert torch.equal(policy._reference_tensors[name], tensor), f"{name} of the reference moved"
    assert policy.frozen_sha256() == policy.fingerprint.sha256
