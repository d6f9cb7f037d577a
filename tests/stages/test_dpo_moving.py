"""``kltune dpo``: a beta for each batch, a reference of the loss that moves, and what is known of the frozen one."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.errors import Interrupted
from kltune.lm.model.snapshot import Snapshot
from kltune.run.caches import REF_LOGPROBS_FILE as NAME
from kltune.run.checkpoint import read_state
from kltune.stages import dpo
from kltune.stages.dpo import LOSS_REFERENCE, MEANS, LossReference, RunningMeans, run_dpo
from kltune.train.learner import Learner
from kltune.train.preferences import Preferences, margins, response_log_ratios
from tests.stages.conftest import ran, rows_of
from tests.stages.test_dpo import small_preferences
from tests.stages.test_resume import assert_same_run, run_with_stops, saved_tensors
from tests.tiny_policies import plain_logprobs

LOG2 = math.log(2.0)
SAMPLED = "kl.hard_cap=500"  # far away: the KL is measured at every step and moves nothing
LEAP = ("dpo.reference_alpha=1.0",)
OWN_KEYS = ("dpo/margin_nats", "kl/loss_ref_nats_per_response")


# ---- a beta for each batch --------------------------------------------------------------------------------------


def test_the_beta_of_a_batch_follows_its_margin_and_the_running_mean(trained_policy, tmp_path, dpo_recipe):
    recipe = dpo_recipe("dpo.dynamic_beta=0.6", "dpo.beta=0.2")
    part = small_preferences(trained_policy, tmp_path, "sigmoid")
    learner = Learner(trained_policy, parts={MEANS: RunningMeans(margin=0.5)})
    h = margins(response_log_ratios(trained_policy, part))
    margin = h.mean().item()
    assert abs(margin) > 0.1

    found = dpo.beta_of_batch(recipe.dpo, learner, part)
    usual = 0.9 * 0.5 + 0.1 * margin        # has heard of this batch
    beta = 0.2 * max(1.0 + 0.6 * (margin - usual), 0.01)
    assert learner.parts[MEANS].margin == pytest.approx(usual)
    assert found == pytest.approx(beta)
    stats = dpo.add_loss_gradient(recipe, learner, part, found, first=False, held=part)
    assert stats["loss/mean"] == pytest.approx(torch.log1p(torch.exp(-beta * h)).mean().item(), rel=1e-5)


def test_the_beta_of_each_step_is_reported_and_prices_no_kl(dpo_recipe):
    rows, usual = ran(dpo_recipe("dpo.dynamic_beta=0.6", "run.steps=8", "eval.responses=2"))[1], 0.0
    assert rows[0]["dpo/beta"] == pytest.approx(0.1, rel=1e-4)       # before anything has moved every margin is 0
    for row in rows:
        usual = 0.9 * usual + 0.1 * row["pairs/margin_nats"]
        beta = 0.1 * max(1.0 + 0.6 * (row["pairs/margin_nats"] - usual), 0.01)
        assert row["dpo/margin_mean_nats"] == pytest.approx(usual, rel=1e-4, abs=1e-5)
        assert row["dpo/beta"] == pytest.approx(beta, rel=1e-4)
        assert row["kl/beta"] == 0.0
    assert rows[-1]["dpo/beta"] > 0.15


# ---- a reference of the loss that moves -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_reference_that_has_not_moved_yet_changes_no_bit(dpo_recipe, tmp_path, loss):
    keys = (f"dpo.loss={loss}", "run.steps=5", "kl.beta=0.1", "eval.responses=4")
    plain, moving = (dpo_recipe(*keys, *more, output=str(tmp_path / name)) for name, more in (
        ("plain", ()), ("moving", (*LEAP, "dpo.reference_every=6"))
    ))
    for recipe in (plain, moving):
        run_dpo(recipe, resume=False)
    assert [_without_own(row) for row in rows_of(moving)] == [_without_own(row) for row in rows_of(plain)]
    for row in rows_of(moving):
        assert row["dpo/margin_nats"] == row["pairs/margin_nats"]
        assert row["kl/loss_ref_nats_per_response"] == pytest.approx(row["kl/ref_nats_per_response"], abs=1e-5)
    mine, other = (saved_tensors(tmp_path / name, 5) for name in ("moving", "plain"))
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())
    assert len(mine) > len(other)


def _without_own(row: dict) -> dict:
    left_out = ("time/", "memory/", *OWN_KEYS)
    return {name: value for name, value in row.items() if not name.startswith(left_out) and "per_second" not in name}


def test_a_loss_held_against_the_step_before_starts_each_step_at_0_while_the_kl_grows(dpo_recipe):
    _, rows = ran(dpo_recipe(*LEAP, SAMPLED, "run.steps=8", "eval.responses=4"))
    for row in rows:
        assert row["loss/mean"] == pytest.approx(LOG2, abs=1e-5)
        assert row["dpo/margin_nats"] == pytest.approx(0.0, abs=1e-4)
        assert row["kl/loss_ref_nats_per_response"] == 0.0
    distances = [row["kl/ref_nats_per_response"] for row in rows]
    assert distances[0] == pytest.approx(0.0, abs=1e-6)
    assert distances[-1] > 2.0 * distances[3] > 4.0 * distances[1] > 0.0
    assert rows[-1]["pairs/margin_nats"] > 2.0       # to the frozen reference, as everything else
    assert rows[-1]["accuracy/mean"] == 1.0


def test_a_leap_every_few_steps_is_between(dpo_recipe):
    recipe = dpo_recipe(*LEAP, "dpo.reference_every=3", SAMPLED, "run.steps=7", "eval.responses=4")
    own = [row["dpo/margin_nats"] for row in ran(recipe)[1]]
    assert [abs(margin) < 1e-4 for margin in own] == [True, False, False, True, False, False, True]
    whole = [row["pairs/margin_nats"] for row in rows_of(recipe)]
    assert own[1:3] == whole[1:3]
    assert all(mine < all_of_it for mine, all_of_it in zip(own[3:], whole[3:], strict=True))


def test_the_reference_goes_as_far_as_its_alpha_says(dpo_recipe, monkeypatch):
    recipe = dpo_recipe("dpo.reference_alpha=0.25", "dpo.reference_every=2", "run.steps=2", "eval.responses=2")
    learners = []
    make = dpo.make_learner
    monkeypatch.setattr(dpo, "make_learner", lambda *given: learners.append(make(*given)) or learners[0])
    run_dpo(recipe, resume=False)
    policy = learners[0].policy
    tensors, _ = read_state(Path(recipe.run.output) / "checkpoints" / "step-000002")
    for name, tensor in policy.trainable_parameters().items():
        wanted = torch.lerp(policy.untrained[name], tensor.detach(), 0.25)
        torch.testing.assert_close(tensors["loss_reference"][name], wanted)


def test_plain_dpo_measures_no_kl_to_it(dpo_recipe):
    recipe = dpo_recipe(*LEAP, "run.steps=2", "eval.responses=2")
    assert [row["kl/loss_ref_nats_per_response"] for row in ran(recipe)[1]] == [None, None]


@pytest.mark.parametrize("loss", ["robust", "ipo", "hinge", "kto", "bco", "f_dpo", "chi_po"])
def test_every_loss_with_a_reference_may_have_it_moved(dpo_recipe, loss):
    smoothing = ("dpo.label_smoothing=0.1",) if loss == "robust" else ()
    recipe = dpo_recipe(f"dpo.loss={loss}", *smoothing, *LEAP, "run.steps=4", "eval.responses=2")
    losses = [row["loss/mean"] for row in ran(recipe)[1]]
    assert losses[3] == pytest.approx(losses[0], abs=1e-3)     # where policy and reference are one, each time
    assert rows_of(recipe)[-1]["pairs/margin_nats"] > 0.3
    if loss == "bco":
        assert max(abs(row["pairs/reward_mean"]) for row in rows_of(recipe)) < 1e-4


def test_the_point_of_kto_is_held_against_it_too(trained_policy, tmp_path, dpo_recipe):
    part = small_preferences(trained_policy, tmp_path, "kto")
    parameters = trained_policy.trainable_parameters()
    learner = Learner(trained_policy, parts={LOSS_REFERENCE: LossReference(Snapshot(parameters))})
    section = dpo_recipe("dpo.loss=kto").dpo
    assert dpo.reference_point(section, learner, part) == 0.0
    before = _logprobs_of(trained_policy, part.mismatched())
    for tensor in parameters.values():
        tensor.data.mul_(0.5)
    wanted = (_logprobs_of(trained_policy, part.mismatched()) - before).mean().item()
    assert wanted > 0.1
    assert dpo.reference_point(section, learner, part) == pytest.approx(wanted, abs=1e-4)


def _logprobs_of(policy, examples) -> torch.Tensor:
    rows = [(torch.tensor([example.ids]), torch.tensor([example.scored])) for example in examples]
    return torch.stack([plain_logprobs(policy.model, *row).sum() for row in rows])


def test_pairs_of_its_own_are_held_against_it_at_their_temperature(online_recipe):
    recipe = online_recipe(*LEAP, "run.steps=4", "sampling.temperature=0.7", "eval.responses=2")
    for row in ran(recipe)[1]:
        assert row["dpo/margin_nats"] == pytest.approx(0.0, abs=1e-4)
        assert row["kl/loss_ref_nats_per_response"] == 0.0
    assert abs(rows_of(recipe)[-1]["pairs/margin_nats"]) > 0.05


# ---- what is known of the frozen reference ----------------------------------------------------------------------


def keep(path):
    pass


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(("change", "again", "words"), [(keep, 0, ""), (damage, 2, "is damaged"), (Path.unlink, 2, "")])
def test_a_run_that_goes_on_measures_only_what_it_has_lost(
    dpo_recipe, monkeypatch, tmp_path, capsys, change, again, words
):
    keys = ("run.steps=4", "run.eval_every=2", "eval.pairs=held_out_pairs.jsonl")
    broken, unbroken = (dpo_recipe(*keys, output=str(tmp_path / name)) for name in ("broken", "unbroken"))
    run_dpo(unbroken, resume=False)
    measured, under = [], Preferences._under

    def counted(self, *given):
        measured.append(len(self))
        return under(self, *given)

    def run(recipe, resume: bool):
        if resume:
            change(tmp_path / "broken" / NAME)
            measured.clear()
            capsys.readouterr()
        return run_dpo(recipe, resume=resume)

    monkeypatch.setattr(Preferences, "_under", counted)
    run_with_stops(run, broken, (2,))
    assert len(measured) == again       # the pairs that are learnt from, and those that are held out
    assert words in capsys.readouterr().err
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", 4)
    kept, wanted = (load_file(tmp_path / name / NAME) for name in ("broken", "unbroken"))
    assert len(kept) == 2
    assert all(torch.equal(kept[key], tensor) for key, tensor in wanted.items())


def test_what_was_measured_before_a_failed_start_serves_no_other_pairs(dpo_recipe, monkeypatch, tmp_path, capsys):
    recipe = dpo_recipe("run.steps=4")
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "take_steps", _stopped)
        with pytest.raises(Interrupted):
            run_dpo(recipe, resume=False)
    run_dpo(dpo_recipe("run.steps=4", "optim.batch_size=2"), resume=False)
    assert "the reference was measured again" in capsys.readouterr().err


def _stopped(*_):
    raise Interrupted("stopped before the first step", 15)
