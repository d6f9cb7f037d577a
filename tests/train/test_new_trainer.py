"""A trainer that kltune does not have, from public pieces alone: best-of-n, each step an SFT step on the best answers.

Everything around its one update is the loop's: it begins, evaluates, saves, stops at a signal, resumes and finishes.
"""

from pathlib import Path
from typing import Any

import torch

from kltune.lm.model.batches import response_scatter
from kltune.lm.model.policy import Policy
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import PPORecipe
from kltune.run.optimizer import guarded_step, learning_rate_share, make_optimizer, set_learning_rate, total_steps
from kltune.run.recorder import Clock
from kltune.run.session import Run, run_stage
from kltune.train.batch import sample_batch
from kltune.train.budget import Budget
from kltune.train.evaluation.alarms import Alarms
from kltune.train.learner import ALARMS, SCORER, Job, Learner, make_job
from kltune.train.loop import Taken, enforce_cap, load_data, take_steps
from tests.stages import conftest as stages
from tests.stages.test_resume import CUTS, STEPS, assert_same_run, run_with_stops


def train(recipe: PPORecipe, policy: Policy, run: Run) -> dict[str, Any]:
    prompts, held_out = load_data(recipe, policy, run)
    optimizer = make_optimizer(policy.trainable_parameters(), recipe.optim, "policy")
    scorer = load_scorer(recipe.reward, recipe.folder, policy.device, policy, run.answers)
    steps = total_steps(recipe.run, len(prompts), recipe.sampling.prompts_per_step)
    parts = {ALARMS: Alarms(), SCORER: scorer}
    learner = Learner(policy, {"policy": optimizer}, Budget.of(recipe.kl, steps), parts)
    return take_steps(make_job(recipe, run, held_out, steps, prompts=prompts), learner, take_step)


def take_step(job: Job, learner: Learner, step: int) -> Taken:
    recipe, clock = job.recipe, Clock()
    batch = sample_batch(job, learner, step, clock)
    if enforce_cap(job, learner, step, batch, pull=batch.spread):
        return Taken({}, clock, batch, went_back=True)
    count = recipe.sampling.responses_per_prompt
    firsts = torch.arange(0, len(batch.scores), count)
    best = batch.rollout.select(firsts + batch.scores.view(-1, count).argmax(dim=1))
    logprobs = learner.policy.logprobs(best.ids, best.scored, recipe.sampling.temperature)
    loss = -response_scatter(logprobs, best.response_mask).sum() / best.response_mask.sum()
    loss.backward()
    optimizer, lr = learner.optimizers["policy"], learning_rate_share(recipe.optim, step, job.steps) * recipe.optim.lr
    set_learning_rate(optimizer, lr)
    norm = guarded_step(optimizer, recipe.optim.max_grad_norm, "policy")
    clock.lap("update")
    return Taken({"ppo/policy_loss": loss.item(), "ppo/policy_grad_norm": norm, "optim/lr": lr}, clock, batch)


def best_of_n(recipe: PPORecipe, resume: bool) -> dict[str, Any]:
    return run_stage(recipe, resume, train)


llama, _no_page = stages.llama, stages._no_page
best_recipe = stages.recipe_fixture("best_recipe", stages.PPO | {
    "ppo": stages.PPO["ppo"] | {"baseline": "rloo"},
    "kl": {"control": "fixed", "beta": 0.0},
    "sampling": stages.PPO["sampling"] | {"responses_per_prompt": 4},
    "run": stages.PPO["run"] | {"eval_every": 2},
})


def test_it_raises_the_score_and_its_kl_is_measured(best_recipe):
    recipe = best_recipe("run.steps=15", "eval.responses=100", "data.prompts=many.jsonl",
                         "sampling.prompts_per_step=24", "sampling.responses_per_prompt=8")
    result = best_of_n(recipe, resume=False)
    rows = stages.rows_of(recipe)
    assert rows[0]["kl/ref_nats_per_response"] == 0.0
    assert rows[-1]["kl/ref_nats_per_response"] > 0.05
    assert result["kl"]["nats_per_response"] > 0.05
    assert result["score"] > 1.5 * result["reference_score"] > 0.0
    assert (Path(result["final"]) / "adapter_model.safetensors").exists()


def test_stopped_by_a_signal_it_goes_on_bit_for_bit_within_its_cap(best_recipe, tmp_path):
    keys = (f"run.steps={STEPS}", "kl.hard_cap=0.4", "optim.lr=0.1", "sampling.prompts_per_step=32",
            "data.prompts=many.jsonl", "eval.prompts=many.jsonl", "eval.responses=65")
    broken, unbroken = (best_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    result = best_of_n(unbroken, resume=False)
    run_with_stops(best_of_n, broken, CUTS)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", STEPS)
    assert result["cap_rollbacks"] > 0
    assert result["kl"]["ci95"][1] <= 0.4
