"""``kltune dpo``: the gradient of every loss, plain runs, an online price of KL, a target, a cap, resuming."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.core.control.controllers import pull_at
from kltune.errors import DataError, DivergedError, RecipeError
from kltune.lm.model.sampler import sample_rollout
from kltune.recipe import DataSection, DPOSection
from kltune.report.pages import write_page
from kltune.stages import dpo
from kltune.stages.dpo import MEANS, RunningMeans, add_kl_gradient, run_dpo
from kltune.train import loop as training
from kltune.train.learner import Learner
from kltune.train.preferences import load_preferences, margins, preference_losses, response_log_ratios, scale_of
from tests.lm.model.test_sampler import PROMPTS as SAMPLED
from tests.lm.model.test_sampler import UNIFORMS
from tests.stages.conftest import HELD_OUT, PROMPTS, ran, read_jsonl, rows_of, write_rows
from tests.stages.test_resume import run_with_stops
from tests.tiny_policies import plain_logprobs, randomize

LOG2 = math.log(2.0)
FIRST_LOSS = {       # where policy and reference are one
    "sigmoid": LOG2, "robust": LOG2, "ipo": (0.5 / 0.1) ** 2, "hinge": 1.0, "kto": 0.5, "bco": LOG2, "f_dpo": LOG2,
    "chi_po": LOG2,
}
LOSSES = (*FIRST_LOSS, "orpo", "simpo")
PULL = ("optim.lr=0.1", "run.steps=12", "sampling.prompts_per_step=32", "data.prompts=many.jsonl", "dpo.beta=0.05")
MANY = ("eval.prompts=many.jsonl", "eval.responses=130")


def keys_of(loss: str) -> tuple[str, ...]:
    return (f"dpo.loss={loss}", *(("dpo.label_smoothing=0.1",) if loss == "robust" else ()))


# ---- gradients --------------------------------------------------------------------------------------------------


def small_preferences(policy, folder: Path, loss: str):
    pairs = [
        {"prompt": "w3 w4 w5", "chosen": "w6 w7", "rejected": "w8"},
        {"prompt": "w9", "chosen": "w10 w11 w12 w13", "rejected": "w14 w15"},
        {"prompt": "w16 w17", "chosen": "w18", "rejected": "w19 w20 w21 w22 w23"},
    ]
    write_rows(folder / "small.jsonl", pairs)
    found, _ = load_preferences(str(folder / "small.jsonl"), policy, DataSection(), labelled=loss in ("kto", "bco"))
    return found.measured(policy, range(len(found)))


@pytest.mark.parametrize("micro", [None, 1, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_the_loss_on_one_response_at_a_time(trained_policy, tmp_path, dpo_recipe, loss, micro):
    policy, recipe = trained_policy, dpo_recipe(*keys_of(loss), f"optim.micro_batch_size={json.dumps(micro)}")
    part = small_preferences(policy, tmp_path, loss)
    learner = Learner(policy, parts={MEANS: RunningMeans(reward=0.05)} if loss == "bco" else {})
    stats = dpo.add_loss_gradient(recipe, learner, part, recipe.dpo.beta, first=False, held=part)
    parameters = list(policy.trainable_parameters().values())
    found = [parameter.grad for parameter in parameters]

    # The other side: the transformers model itself, a row at a time, reference by PEFT's own switch.
    logprobs, reference, lengths = [], [], []
    for example in part.examples:
        ids, scored = torch.tensor([example.ids]), torch.tensor([example.scored])
        table = policy.model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
        logprobs.append(table.gather(-1, ids[:, 1:, None])[..., 0][scored[:, 1:]].double().sum())
        with policy.model.disable_adapter():
            reference.append(plain_logprobs(policy.model, ids, scored).sum())
        lengths.append(int(scored.sum()))
    logprobs = torch.stack(logprobs)
    ratio, mean = logprobs - torch.stack(reference), logprobs / torch.tensor(lengths)
    point = dpo.reference_point(recipe.dpo, learner, part)
    values = preference_losses(recipe.dpo, ratio, mean, part.wanted, beta=recipe.dpo.beta, point=point)
    wanted = torch.autograd.grad(values.mean(), parameters, allow_unused=True, materialize_grads=True)
    assert stats["loss/mean"] == pytest.approx(values.mean().item(), rel=1e-5)
    largest = max(tensor.abs().max().item() for tensor in wanted)
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-5 * largest, rtol=1e-3)


def test_ipo_averages_over_tokens_where_trl_is_compared_with(trained_policy, tmp_path, dpo_recipe):
    part, losses = small_preferences(trained_policy, tmp_path, "ipo"), {}
    for average in ("false", "true"):
        recipe = dpo_recipe("dpo.loss=ipo", "dpo.beta=0.5", f"dpo.average_logprobs={average}")
        stats = dpo.add_loss_gradient(recipe, Learner(trained_policy), part, 0.5, first=False, held=part)
        losses[average] = stats["loss/mean"]
    ratio = response_log_ratios(trained_policy, part)
    for average, lengths in (("false", torch.ones(6)), ("true", torch.tensor([sum(e.scored) for e in part.examples]))):
        h = margins(ratio / lengths)
        assert losses[average] == pytest.approx((h - 1.0).square().mean().item(), rel=1e-4)
    assert losses["true"] != pytest.approx(losses["false"], rel=0.01)


def test_only_ipo_averages(dpo_recipe):
    with pytest.raises(RecipeError, match="read only by loss ipo"):
        dpo_recipe("dpo.average_logprobs=true")


def test_kto_is_held_against_responses_of_other_prompts(trained_policy, tmp_path):
    part = small_preferences(trained_policy, tmp_path, "kto")
    for mine, other in zip(part.examples, part.mismatched(), strict=True):
        start = mine.scored.index(True)
        assert other.ids[:start] == mine.ids[:start]
        assert other.scored.index(True) == start
        assert other.ids[start:] not in [e.ids[start:] for e in part.examples if e.ids[:start] == mine.ids[:start]]


def test_the_reference_is_measured_with_the_adapter_off(trained_policy, tmp_path):
    part = small_preferences(trained_policy, tmp_path, "sigmoid")
    randomize(trained_policy.trainable_parameters(), seed=5)
    again = small_preferences(trained_policy, tmp_path, "sigmoid")
    assert torch.equal(part.ref_logprobs, again.ref_logprobs)


def test_the_scale_makes_a_nat_of_margin_worth_about_one():
    for loss, worth in {"sigmoid": 0.5, "hinge": 1.0, "ipo": 1.0, "chi_po": 1.0, "f_dpo": 0.5}.items():
        section = DPOSection(loss=loss)
        h = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        ratio = torch.stack([h / 2, -h / 2], dim=1).flatten()
        value = preference_losses(section, ratio, ratio, torch.tensor([True, False]), beta=0.25, point=0.0).sum()
        slope = torch.autograd.grad(value, h)[0].item() / scale_of(loss, 0.25)
        assert -slope == pytest.approx(worth), loss


# ---- plain DPO --------------------------------------------------------------------------------------------------


def test_plain_dpo_learns_and_samples_nothing_but_evaluations(dpo_recipe, monkeypatch):
    monkeypatch.setattr(dpo, "sample_batch", lambda *args: pytest.fail("a response was sampled"))
    result, rows = ran(dpo_recipe("run.steps=12", "run.eval_every=5", "eval.pairs=held_out_pairs.jsonl"))
    assert rows[0]["loss/mean"] == pytest.approx(LOG2, abs=1e-6)
    assert rows[-1]["loss/mean"] < 0.5
    assert rows[0]["accuracy/mean"] == 0.5      # before any update every pair is a tie, whatever rounding says
    assert rows[-1]["accuracy/mean"] == 1.0
    assert rows[-1]["pairs/margin_nats"] == pytest.approx(
        rows[-1]["pairs/chosen_log_ratio_nats"] - rows[-1]["pairs/rejected_log_ratio_nats"]
    )
    for row in rows:
        for name in ("kl/ref_nats_per_response", "kl/ref_stderr", "kl/ref_nats_per_token"):
            assert row[name] is None
        assert row["kl/beta"] == 0.0
        assert "kl/fwd_offline_nats_per_response" not in row
        assert ("eval/kl_ref_nats_per_response" in row) == (row["step"] in (5, 10))
    assert rows[4]["eval/kl_ref_nats_per_response"] > 0.0
    assert result["kl"]["nats_per_response"] > rows[4]["eval/kl_ref_nats_per_response"]
    assert (result["stage"], result["target"], result["score"], result["held_out"]) == ("dpo", None, None, True)
    evaluated = result["eval"]
    assert 0.0 <= evaluated["eval/accuracy_low"] <= evaluated["eval/accuracy"] <= evaluated["eval/accuracy_high"] <= 1.0
    assert evaluated["eval/margin_nats"] > 2 * evaluated["eval/margin_stderr"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_starts_where_it_should_and_falls(dpo_recipe, loss):
    result, rows = ran(dpo_recipe(*keys_of(loss), "run.steps=8", "optim.batch_size=12", "eval.responses=2"))
    if loss in FIRST_LOSS:
        assert rows[0]["loss/mean"] == pytest.approx(FIRST_LOSS[loss], rel=1e-5)
    assert rows[-1]["loss/mean"] < rows[0]["loss/mean"]
    assert rows[-1]["pairs/margin_nats"] > 0.5
    assert (rows[-1]["accuracy/mean"] is None) == (loss in ("kto", "bco"))
    assert result["kl"]["nats_per_response"] > 0.0


def test_responses_judged_one_by_one_are_enough_for_kto_and_bco(dpo_recipe, tmp_path):
    judged = [{"prompt": p, "response": r, "label": r == "aa"} for p in PROMPTS for r in ("aa", "zz")]
    write_rows(tmp_path / "dpo" / "judged.jsonl", judged)
    keys = ("data.pairs=judged.jsonl", "run.steps=6", "eval.responses=2")
    for loss in ("kto", "bco"):
        assert ran(dpo_recipe(f"dpo.loss={loss}", *keys, output=str(tmp_path / loss)))[1][-1]["pairs/margin_nats"] > 0.5
    with pytest.raises(DataError, match='field "chosen": missing'):
        run_dpo(dpo_recipe(*keys), resume=False)


def test_pairs_of_the_reference_give_an_estimate_of_the_forward_kl(dpo_recipe):
    for row in ran(dpo_recipe("dpo.from_reference=true", "run.steps=2", "eval.responses=2"))[1]:
        both = row["pairs/chosen_log_ratio_nats"] + row["pairs/rejected_log_ratio_nats"]
        assert row["kl/fwd_offline_nats_per_response"] == pytest.approx(-both / 2, abs=1e-9)


# ---- the price and the target -----------------------------------------------------------------------------------


def test_a_price_keeps_the_policy_nearer_and_the_kl_is_measured_at_every_step(dpo_recipe, tmp_path):
    distances = []
    for beta in (0.0, 0.3, 3.0):
        recipe = dpo_recipe(f"kl.beta={beta}", "run.steps=20", *MANY, output=str(tmp_path / str(beta)))
        distances.append(run_dpo(recipe, resume=False)["kl"]["nats_per_response"])
        for row in rows_of(recipe):
            assert (row["kl/ref_nats_per_response"] is None) == (beta == 0.0)
            assert row["kl/beta"] == beta
    assert distances[0] > 1.5 * distances[1] > 2.0 * distances[2]


def test_the_gradient_of_the_kl_is_the_same_in_micro_batches(dpo_recipe, tmp_path):
    weights = []
    for micro in ("null", "2"):
        recipe = dpo_recipe(
            "kl.beta=0.5", "run.steps=3", f"optim.micro_batch_size={micro}", "eval.responses=2",
            output=str(tmp_path / micro),
        )
        run_dpo(recipe, resume=False)
        weights.append(load_file(Path(recipe.run.output) / "final" / "adapter_model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], atol=1e-4, rtol=1e-3)


def test_the_sampled_policy_is_the_old_one_whatever_rounding_makes_of_it(dpo_recipe, trained_policy):
    recipe, gradients = dpo_recipe("kl.beta=0.5"), []
    rollout = sample_rollout(trained_policy, SAMPLED, UNIFORMS, temperature=1.0)
    rounded = replace(rollout, logprobs=rollout.logprobs + 0.1 * torch.randn_like(rollout.logprobs))
    for old in (rollout, rounded):
        add_kl_gradient(recipe, trained_policy, old)
        parameters = trained_policy.trainable_parameters().values()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        for parameter in parameters:
            parameter.grad = None
    assert gradients[0].norm() > 0.0
    assert torch.equal(*gradients)


def test_a_run_until_its_target_knows_the_reference_of_pairs_beyond_its_steps(dpo_recipe):
    keys = ("run.until=target", "run.steps=2", "kl.control=target", "kl.beta=auto", "kl.target=50",
            "optim.batch_size=4", "sampling.prompts_per_step=4")
    assert run_dpo(dpo_recipe(*keys), resume=False)["steps"] == 10


TARGET = (
    "kl.control=target", "kl.beta=auto", "run.steps=60", "sampling.prompts_per_step=48", "data.prompts=many.jsonl",
)


def test_a_target_is_held_where_the_pairs_would_go_further(dpo_recipe, tmp_path):
    plain = run_dpo(dpo_recipe("run.steps=60", *MANY, output=str(tmp_path / "plain")), resume=False)
    target = 0.4 * plain["kl"]["nats_per_response"]
    recipe = dpo_recipe(*TARGET, f"kl.target={target}", "kl.land=false", *MANY, output=str(tmp_path / "target"))
    result = run_dpo(recipe, resume=False)
    late = [row["kl/ref_nats_per_response"] for row in rows_of(recipe)[40:]]
    assert sum(late) / len(late) == pytest.approx(target, rel=0.2)
    assert result["kl"]["nats_per_response"] == pytest.approx(target, rel=0.25)
    assert max(row["kl/ref_nats_per_response"] for row in rows_of(recipe)) < 1.35 * target
    # before anything has moved, the pull is LOSS_PULL and the error at its least
    assert rows_of(recipe)[0]["kl/beta"] == pytest.approx(max(0.5 * math.exp(-9.0) / math.sqrt(2 * target), 1e-4))
    assert rows_of(recipe)[-1]["accuracy/mean"] == 1.0


def test_the_balance_is_a_share_of_where_both_gradients_are_as_large():
    own, kl = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])], [torch.tensor([0.6, 0.0]), torch.tensor([[0.8]])]
    price = dpo.starting_price(own, kl, 0.1, 0.4)
    assert price == pytest.approx(0.4 * 50.0)
    assert pull_at(price, 2.0) == pytest.approx(0.4 * 50.0 * math.sqrt(2 * 2.0))
    assert dpo.starting_price(own, [torch.zeros(2)], 0.1, 0.4) is None
    with pytest.raises(DivergedError, match="not finite"):
        dpo.starting_price([torch.tensor([math.nan])], kl, 0.1, 0.4)


def test_a_target_that_the_pairs_never_reach_is_said_to_be_unused(dpo_recipe, capsys):
    recipe = dpo_recipe(*TARGET, "kl.target=500", "run.steps=30", *MANY)
    result = run_dpo(recipe, resume=False)
    assert result["target_unused"] is True
    assert result["alpha"] == 1.0
    assert "below the target 500: the rest of the budget is not used" in capsys.readouterr().err
    prices = [row["kl/beta"] for row in rows_of(recipe)]
    assert min(prices) >= 1e-4
    assert max(prices) < 0.05


# ---- the cap, and resuming ----------------------------------------------------------------------------------------


def test_after_going_back_the_optimizer_no_longer_moves_outward(dpo_recipe, monkeypatch, unlimited):
    moments = []
    close = training.close_step

    def spy(job, learner, step, taken):
        if taken.went_back:
            named = learner.moving()["policy_optimizer"]
            moments.append((
                max(t.abs().max().item() for name, t in named.items() if name.endswith("/exp_avg")),
                max(t.abs().max().item() for name, t in named.items() if name.endswith("/exp_avg_sq")),
            ))
        close(job, learner, step, taken)

    monkeypatch.setattr(training, "close_step", spy)
    run_dpo(dpo_recipe(*PULL, "optim.lr=0.03", "kl.hard_cap=1", *MANY), resume=False)
    assert moments
    assert all(first == 0.0 and second > 0.0 for first, second in moments)


def test_a_run_does_not_go_on_with_other_pairs(dpo_recipe, monkeypatch, tmp_path):
    recipe = dpo_recipe("run.steps=4")
    with pytest.raises(DataError, match=r"data\.pairs: .* has changed"):
        run_with_stops(_changing_pairs(tmp_path / "dpo" / "pairs.jsonl"), recipe, (2,))


def _changing_pairs(path: Path):
    def run(recipe, resume: bool):
        if resume:
            rows = read_jsonl(path)
            write_rows(path, [rows[0] | {"chosen": "b"}, *rows[1:]])
        return run_dpo(recipe, resume=resume)

    return run


# ---- what else reads the run ------------------------------------------------------------------------------------


def test_transcripts_need_no_prompts_of_their_own(dpo_recipe, tmp_path, eval_kl):
    rows = [{"chosen": f"{t}\n\nAssistant: a", "rejected": f"{t}\n\nAssistant: zz"} for t in (*PROMPTS, *HELD_OUT)]
    write_rows(tmp_path / "dpo" / "transcripts.jsonl", [*rows * 5, rows[0] | {"rejected": rows[1]["rejected"][:3]}])
    recipe = dpo_recipe(
        "data.pairs=transcripts.jsonl", "data.on_bad_row=skip", "eval.prompts=null", "eval.responses=44", "kl.beta=0.1",
        "run.steps=3",
    )
    result = run_dpo(recipe, resume=False)
    assert result["held_out"] is False
    assert result["kl"]["prompts"] == len(rows)
    assert read_jsonl(Path(result["output"]) / "samples.jsonl")[0]["prompt"].endswith("Assistant:")


def test_eval_kl_measures_the_run_on_the_prompts_of_its_pairs(dpo_recipe, eval_kl):
    result = run_dpo(dpo_recipe("eval.prompts=null", "run.steps=6", "eval.responses=48"), resume=False)
    code, document, _ = eval_kl(result["output"], "--responses", 48, "--seed", 3)
    assert code == 0
    assert document["prompts"] == len(PROMPTS)
    ours, theirs = result["kl"], document["kl"]["exact"]
    gap = abs(ours["nats_per_response"] - theirs["nats_per_response"])
    assert gap < 4 * math.hypot(ours["stderr"], theirs["stderr"])


def test_the_command_prints_its_result_and_the_page_shows_margins(dpo_recipe, command):
    keys = ("run.steps=3", "kl.control=target", "kl.beta=auto", "kl.target=50", "eval.pairs=held_out_pairs.jsonl")
    overrides = [part for key in keys for part in ("--set", key)]
    code, result, _ = command("dpo", "--recipe", dpo_recipe().folder / "recipe.yaml", *overrides)
    assert code == 0
    folder = Path(result["output"])
    assert result == json.loads((folder / "result.json").read_text())
    page = write_page(folder).read_text(encoding="utf-8")
    for words in ("Margin of the pairs", "Log-ratio to the reference", "Accuracy", "the rest of the budget is not"):
        assert words in page
