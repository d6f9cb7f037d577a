"""The losses and baselines of groups in ``kltune ppo``: what each is asked for by, learns by, and refuses."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from kltune.core.control.controllers import LogPI
from kltune.errors import RecipeError, ScorerError
from kltune.lm.rewards.scorers import load_scorer
from kltune.stages.ppo import EntropyFloor
from kltune.train.experience import compute_advantages, rescaled, spread_of
from tests.oracles import Responses, tiny_policy_logits
from tests.stages.conftest import ran, write_rows

LONG = ("sampling.prompts_per_step=24", "data.prompts=many.jsonl", "sampling.responses_per_prompt=4", "run.steps=10",
        "kl.target=3", "ppo.minibatch_size=32", "eval.prompts=many.jsonl", "eval.responses=130")
VARIANTS = {
    "dr_grpo": ("ppo.baseline=dr_grpo",),
    "reinforce_pp": ("ppo.baseline=reinforce_pp",),
    "gspo": ("ppo.baseline=grpo", "ppo.loss=sequence", "ppo.clip_range=0.05"),
    "cispo, dapo's clip": ("ppo.baseline=grpo", "ppo.loss=cispo", "ppo.clip_range_high=0.28"),
}


@pytest.mark.parametrize("keys", VARIANTS.values(), ids=VARIANTS.keys())
def test_each_raises_the_score(ppo_recipe, keys):
    result, rows = ran(ppo_recipe(*LONG, *keys))
    assert result["score"] > 1.3 * result["reference_score"] > 0.0
    assert 0.0 < max(row["ppo/clip_fraction"] for row in rows) < 1.0


def test_defaults_follow_the_baseline_and_the_loss(ppo_recipe):
    averages = {keys: ppo_recipe(*keys).ppo.average for keys in (
        (), ("ppo.baseline=grpo",), ("ppo.baseline=dr_grpo",), ("ppo.loss=sequence", "ppo.baseline=rloo"),
    )}
    assert list(averages.values()) == ["tokens", "tokens", "limit", "responses"]


@pytest.mark.parametrize(("keys", "said"), [
    (("ppo.loss=sequence",), "differ from token to token"),
    (("ppo.loss=sequence", "ppo.baseline=grpo", "ppo.average=tokens"), "wanted responses"),
    (("ppo.average=responses", "kl.placement=loss"), r"kl\.placement"),
    (("ppo.baseline=dr_grpo", "sampling.responses_per_prompt=1"), "wanted at least 2"),
])
def test_what_does_not_go_together(ppo_recipe, keys, said):
    with pytest.raises(RecipeError, match=said):
        ppo_recipe(*keys)


ROWS = '''
def answered(prompts, responses, rows):
    """As many as the row's letter, whatever is done to the row."""
    return [float(response.count(row.pop("letter"))) for response, row in zip(responses, rows)]
'''


def test_a_reward_reads_the_row_of_each_prompt(ppo_recipe, tmp_path):
    recipe = ppo_recipe("reward.0.path=rewards.py:answered", "ppo.baseline=grpo", "data.prompts=lettered.jsonl",
                        "eval.prompts=lettered.jsonl", "run.steps=2")
    (tmp_path / "ppo" / "rewards.py").write_text(ROWS)
    write_rows(tmp_path / "ppo" / "lettered.jsonl", [{"prompt": t, "letter": t[-1]} for t in ("oh", "we", "my", "in")])
    result, _ = ran(recipe)
    assert result["score"] >= 0.0
    scorer = load_scorer(recipe.reward, recipe.folder, torch.device("cpu"))
    with pytest.raises(ScorerError, match="wants the data row of each prompt"):
        scorer(["oh"], ["h"])


def test_a_row_that_a_reward_fails_on_is_named(ppo_recipe, tmp_path):
    recipe = ppo_recipe("reward.0.path=rewards.py:answered", "ppo.baseline=grpo", "data.prompts=some.jsonl")
    (tmp_path / "ppo" / "rewards.py").write_text(ROWS)
    write_rows(tmp_path / "ppo" / "some.jsonl", [{"prompt": "oh", "letter": "h"}, {"prompt": "we"}])
    with pytest.raises(ScorerError, match=r"row \d+ \(prompt 'we'.*KeyError: 'letter'"):
        ran(recipe)


@pytest.mark.parametrize("baseline", ["rloo", "dr_grpo", "grpo"])
def test_a_nat_costs_the_same_in_the_loss_as_in_the_reward(baseline):
    # Every pair of answers among three, whose expected gradient is that of E[advantage log-prob] less the priced KL.
    worth, price = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64), 0.7
    logits = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    gradients = {}
    for placement in ("reward", "loss"):
        logprobs, total = logits.log_softmax(0), 0.0
        for both in itertools.product(range(3), repeat=2):
            answers = torch.tensor(both)
            said, theirs = logprobs[answers], reference[answers]
            rollout = SimpleNamespace(
                logprobs=said.detach()[:, None], ref_logprobs=theirs[:, None], response_mask=torch.ones(2, 1).bool()
            )
            batch = SimpleNamespace(rollout=rollout, scores=worth[answers])
            found = compute_advantages(
                batch, price, SimpleNamespace(baseline=baseline), per_prompt=2, placement=placement
            )
            kl = (logprobs.exp() * (logprobs - reference)).sum()
            gain = (found.advantages[:, 0] * said).mean() - found.kl_weight * kl
            total = total + said.detach().sum().exp() * gain
        (gradients[placement],) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(gradients["loss"], gradients["reward"], atol=1e-12, rtol=0.0)
    assert gradients["loss"].abs().max() > 0.01


def test_a_step_of_one_response_is_a_step(ppo_recipe):
    one = ("sampling.prompts_per_step=1", "sampling.responses_per_prompt=1", "ppo.minibatch_size=1", "run.steps=2")
    _, rows = ran(ppo_recipe(*one))
    assert all(row["optim/lr"] > 0.0 for row in rows)


def test_an_entropy_of_nothing_is_paid_for():
    bare = EntropyFloor(1.0, LogPI(None, 1.0, 0.1, 0.0, 1.0, 1e-4, 1e3, near=1, arrived=True))
    assert bare.observed(0.0, pull=1.0, responses=64).price > bare.observed(0.5, pull=1.0, responses=64).price > 0.0


def test_reinforce_pp_divides_by_the_spread_of_the_whole_batch():
    # All batches of two prompts, each answered three times yes or no: p of yes, and what a yes is worth.
    chances, worth, price = (0.3, 0.8), (1.0, 5.0), 0.4
    found, by_hand, scores = ([0.0, 0.0] for _ in range(3))
    for batch in itertools.product((0, 1), repeat=6):
        likely = [chances[place // 3] for place in range(6)]
        weight = math.prod(p if yes else 1 - p for p, yes in zip(likely, batch, strict=True))
        owed = [price * yes for yes in batch]       # a yes lies that many nats from the reference
        gains = [worth[place // 3] * yes - owed[place] for place, yes in enumerate(batch)]
        centred = [gain - sum(gains[place // 3 * 3 :][:3]) / 3 for place, gain in enumerate(gains)]
        spread = math.sqrt(sum(each**2 for each in centred) / 5)
        slopes = [yes - p for p, yes in zip(likely, batch, strict=True)]        # d log p / d its logit
        advantages = _advantages("reinforce_pp", batch, worth, price)
        for place, slope in enumerate(slopes):
            found[place // 3] += weight * advantages[place] * slope
            by_hand[place // 3] += weight * (centred[place] / spread if spread else 0.0) * slope
            scores[place // 3] += weight * _advantages("dr_grpo", batch, worth, price)[place] * slope
    assert found == pytest.approx(by_hand, rel=1e-9)
    # without the division: (n − 1) d E[worth − price] / d logit, to the prompt that is worth less a larger part of it
    exact = [2 * (w - price) * p * (1 - p) for w, p in zip(worth, chances, strict=True)]
    assert scores == pytest.approx(exact, rel=1e-9)
    assert found[0] / found[1] > 1.1 * exact[0] / exact[1]


def _advantages(baseline: str, batch: tuple[int, ...], worth: tuple[float, float], price: float) -> list[float]:
    """Of six answers of one token, three to each prompt, as the stage uses them."""
    yes = torch.tensor(batch, dtype=torch.float64)[:, None]
    rollout = SimpleNamespace(logprobs=yes, ref_logprobs=torch.zeros_like(yes), response_mask=torch.ones(6, 1).bool())
    scores = yes[:, 0] * torch.tensor(worth, dtype=torch.float64).repeat_interleave(3)
    section = SimpleNamespace(baseline=baseline)
    experience = compute_advantages(SimpleNamespace(rollout=rollout, scores=scores), price, section, per_prompt=3)
    if baseline == "reinforce_pp":
        experience = rescaled(experience, spread_of(experience, scores))
    return experience.advantages[:, 0].tolist()


# --- a floor under the entropy ---------------------------------------------------------------------------------------

LOSING = ("kl.control=fixed", "kl.beta=0", "sampling.prompts_per_step=32", "data.prompts=many.jsonl",
          "ppo.minibatch_size=32", "run.steps=24", "ppo.baseline=rloo")


def test_entropy_is_held_above_its_floor(ppo_recipe, tmp_path):
    _, free = ran(ppo_recipe(*LOSING, output=str(tmp_path / "free")))
    _, held = ran(ppo_recipe(*LOSING, "ppo.entropy_floor=2.3", output=str(tmp_path / "held")))
    name = "policy/entropy_nats_per_token"
    assert held[0]["policy/entropy_price"] == 0.0
    assert held[0][name] == free[0][name] > 2.2
    assert free[-1][name] < 2.0
    assert min(row[name] for row in held) > 0.95 * 2.3
    assert held[-1][name] < 1.2 * 2.3
    assert held[-1]["policy/entropy_price"] > 0.0
    assert held[-1]["score/mean"] > 2.0 * held[0]["score/mean"]


def test_what_is_paid_has_the_gradient_of_the_entropy_above_the_floor():
    responses, floor, price = Responses(), 0.6, 0.3
    logits = tiny_policy_logits().requires_grad_()
    chances = responses.probabilities(logits)
    logprobs = responses.logprobs(logits)
    entropy = -(chances * logprobs.sum(-1)).sum()
    (wanted,) = torch.autograd.grad(price * (entropy - floor * (chances * responses.lengths).sum()), logits)
    zeros = torch.zeros_like(logprobs.detach())
    rollout = SimpleNamespace(logprobs=logprobs.detach(), ref_logprobs=logprobs.detach(), response_mask=responses.mask)
    batch = SimpleNamespace(rollout=rollout, scores=zeros[:, 0])
    section = SimpleNamespace(baseline="dr_grpo", entropy_floor=floor)
    found = compute_advantages(batch, 0.0, section, per_prompt=15, entropy_price=price).advantages
    logprobs = responses.logprobs(logits)
    (gradient,) = torch.autograd.grad((chances.detach()[:, None] * found * logprobs).sum(), logits)
    assert torch.allclose(gradient, wanted, atol=1e-12)
