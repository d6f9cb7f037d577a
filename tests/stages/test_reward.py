"""``kltune reward``: it recovers rewards from preferences, says what it is worth, and scores a policy on one trunk."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kltune.core.objectives.bradley_terry import bradley_terry_loss
from kltune.errors import DataError, ModelError, RecipeError, ScorerError
from kltune.lm.rewards.reward_model import HEAD, open_reward_model
from kltune.recipe import load_recipe
from kltune.report.outcome import read_files, verdict_of
from kltune.run.checkpoint import read_info
from kltune.stages import reward
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.trpo import run_trpo
from kltune.train import learner
from tests.oracles import BANDIT_REWARDS
from tests.stages.conftest import PROMPTS, REWARD, ran, read_jsonl, rows_of, write_recipe, write_rows

CPU = torch.device("cpu")


def run_with_rows(recipe_of, rows: list[dict], *overrides: str, held_out: list[dict] | None = None) -> tuple:
    """A run on these rows: its recipe and result."""
    recipe = recipe_of(*overrides)
    write_rows(Path(recipe.data.pairs), rows)
    if held_out is not None:
        write_rows(Path(recipe.eval.pairs), held_out)
    return recipe, run_reward(recipe, resume=False)


# --- what it learns --------------------------------------------------------------------------------------------------


def test_known_rewards_are_recovered_from_simulated_preferences(tmp_path, bandit):
    # Rewards 0 to 3 in units of log 3: Bradley-Terry's odds between two arms are 3, 9 or 27 to 1, and so are the rows.
    arms, rows = "wxyz", []
    for better in range(4):
        for worse in range(better):
            right, wrong = {1: (15, 5), 2: (18, 2), 3: (27, 1)}[better - worse]
            rows += [{"prompt": "<s>", "chosen": arms[better], "rejected": arms[worse]}] * right
            rows += [{"prompt": "<s>", "chosen": arms[worse], "rejected": arms[better]}] * wrong
    path = write_recipe(tmp_path / "bandit", REWARD, bandit, ("<s>",))
    keys = ["run.steps=100", f"optim.batch_size={len(rows)}", "optim.lr=0.05", "eval.pairs_share=0",
            "bradley_terry.centring=0"]
    recipe = load_recipe(path, keys)
    write_rows(Path(recipe.data.pairs), rows)
    result = run_reward(recipe, resume=False)
    reader, _, _ = open_reward_model(Path(result["final"]), None, CPU)
    scores = reader(["<s>"] * 4, list(arms))
    wanted = [math.log(3) * reward for reward in BANDIT_REWARDS.tolist()]
    assert [score - scores[0] for score in scores] == pytest.approx(wanted, abs=0.05)
    assert result["accuracy"] is None


def test_the_loss_falls_from_log_two_and_everything_is_measured(reward_recipe):
    recipe = reward_recipe("run.steps=12", "run.eval_every=5")
    result, rows = ran(recipe)
    assert rows[0]["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[0]["accuracy/mean"] == 0.5
    assert rows[-1]["loss/mean"] < 0.4
    assert [row["step"] for row in rows if row.get("eval/accuracy") is not None] == [5, 10]
    assert result["accuracy"] > 0.8
    low, high = result["accuracy_ci95"]
    assert low < result["accuracy"] <= high
    assert result["held_out_rows"] == 9                              # a quarter of twelve prompts, three rows each
    assert sum(row["count"] for row in result["calibration"]["table"]) == 9
    assert set(result["length"]) == {"length_correlation", "longer_is_chosen", "longer_scores_higher"}
    assert result["kl"] is None
    assert result == json.loads((Path(recipe.run.output) / "result.json").read_text())
    samples = read_jsonl(Path(recipe.run.output) / "samples.jsonl")
    assert [row["side"] for row in samples] == ["chosen", "rejected"] * 4


def test_final_scores_have_mean_0_on_the_training_rows_and_its_file_says_so(reward_recipe):
    recipe = reward_recipe("run.steps=6", "eval.pairs_share=0")
    result = run_reward(recipe, resume=False)
    final = Path(result["final"])
    reader, _, _ = open_reward_model(final, None, CPU)
    rows = read_jsonl(Path(recipe.data.pairs))
    texts = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    scores = torch.tensor(reader(*map(list, zip(*texts, strict=True))))
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert scores.std() > 0.1
    told = read_info(final)["reward"]["centred"]
    assert told == result["centred"] == {"rows": len(rows), "shift": pytest.approx(told["shift"])}
    checkpoint = load_file(Path(recipe.run.output) / "checkpoints" / "step-000006" / HEAD)["bias"].item()
    assert load_file(final / HEAD)["bias"].item() == pytest.approx(checkpoint + told["shift"], abs=1e-5)


def test_of_many_training_rows_a_few_are_centred_on_and_what_takes_long_is_said(reward_recipe, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(reward, "CENTRED_ON", 5)
    monkeypatch.setattr(reward, "doing", said.append)
    monkeypatch.setattr(learner, "doing", said.append)
    result = run_reward(reward_recipe("run.steps=1"), resume=False)
    assert result["centred"]["rows"] == 5
    assert said[-2:] == ["centring the scores on 5 training rows", "evaluation"]


def test_micro_batches_change_no_number(reward_recipe, tmp_path):
    found = []
    for size in ("null", "4"):
        recipe = reward_recipe(f"optim.micro_batch_size={size}", "optim.lr=1e-4", output=str(tmp_path / size))
        found.append([(row["loss/mean"], row["reward/grad_norm"]) for row in ran(recipe)[1]])
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_rows_margin_is_wanted_on_top(reward_recipe):
    rows = [{"prompt": p, "chosen": "a", "rejected": "b", "margin": m} for p, m in zip(PROMPTS, range(12), strict=True)]
    recipe, _ = run_with_rows(reward_recipe, rows, "optim.batch_size=12", "run.steps=1", "eval.pairs_share=0")
    by_hand = bradley_terry_loss(torch.zeros(12), torch.zeros(12), torch.arange(12.0)).mean().item()
    assert rows_of(recipe)[0]["loss/mean"] == pytest.approx(by_hand, abs=1e-5)


def test_smoothing_keeps_the_model_from_being_sure(reward_recipe, tmp_path):
    gaps = []
    for smoothing in (0.0, 0.3):
        keys = (f"bradley_terry.label_smoothing={smoothing}", "run.steps=40", "optim.schedule=constant")
        recipe = reward_recipe(*keys, output=str(tmp_path / str(smoothing)))
        gaps.append(sum(row["reward/gap"] for row in ran(recipe)[1][-5:]) / 5)
    assert gaps[1] == pytest.approx(math.log(0.7 / 0.3), abs=0.3)     # its optimum, 0.847
    assert gaps[0] > 3.0


def test_labelled_responses_give_log_odds(reward_recipe):
    rows = [{"prompt": p, "response": r, "label": r == "a a"} for p in PROMPTS for r in ("a a", "no.")]
    recipe, result = run_with_rows(reward_recipe, rows, "run.steps=20")
    assert rows_of(recipe)[0]["loss/mean"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["accuracy"] == 1.0
    assert result["loss"] < 0.3
    assert result["held_out_rows"] == 6
    assert result["length"].keys() == {"length_correlation"}
    assert result["centred"] is None        # a score of 0 says that either is as likely


def test_the_base_stays_as_it_is_and_another_seed_gives_another_model(reward_recipe, tmp_path):
    heads = []
    for seed in (0, 1):
        result = run_reward(reward_recipe(f"run.seed={seed}", output=str(tmp_path / str(seed))), resume=False)
        heads.append(load_file(Path(result["final"]) / HEAD)["weight"])
    assert not torch.equal(*heads)


# --- what is held out ------------------------------------------------------------------------------------------------


def test_held_out_rows_of_their_own_are_what_is_measured(reward_recipe):
    rows = [{"prompt": p, "chosen": "a a", "rejected": "no"} for p in PROMPTS]
    turned = [{"prompt": "she ", "chosen": "no", "rejected": "a a"}] * 5
    keys = ("eval.pairs=other.jsonl", "eval.pairs_share=0.1", "run.steps=12")
    _, result = run_with_rows(reward_recipe, rows, *keys, held_out=turned)
    assert result["held_out_rows"] == 5
    assert result["accuracy"] == 0.0
    assert result["accuracy_ci95"][0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(("count", "apart"), [(12, False), (3, True)])
def test_held_out_rows_that_are_trained_on_are_counted(reward_recipe, capsys, count, apart):
    rows = [{"prompt": p, "chosen": "a a", "rejected": "no"} for p in PROMPTS]
    held = rows[:count] + [{"prompt": p, "chosen": "no", "rejected": "a a"} for p in PROMPTS[count:]]
    keys = ("eval.pairs=other.jsonl", "eval.pairs_share=0.1", "run.steps=1")
    recipe, result = run_with_rows(reward_recipe, rows, *keys, held_out=held)
    assert result["held_out"] is apart
    assert f"{count} of 12 held-out rows are among the training rows" in capsys.readouterr().err
    assert ("learnt from" in verdict_of(read_files(Path(recipe.run.output))).sentences) is not apart


def test_rows_of_one_prompt_cannot_be_held_out_by_prompt(reward_recipe):
    with pytest.raises(DataError, match=r"all 3 rows answer one prompt.*eval\.pairs"):
        run_with_rows(reward_recipe, [{"prompt": "no", "chosen": c, "rejected": "z"} for c in "abc"])


def test_pairs_and_labels_do_not_mix(reward_recipe):
    labelled = [{"prompt": "so", "response": "a", "label": 1}]
    with pytest.raises(RecipeError, match=r"eval\.pairs: .* not of one kind"):
        run_with_rows(
            reward_recipe, [{"prompt": p, "chosen": "a", "rejected": "b"} for p in PROMPTS], "eval.pairs=other.jsonl",
            "eval.pairs_share=0.1", held_out=labelled,
        )


# --- scoring a policy ------------------------------------------------------------------------------------------------


def test_ppo_raises_the_score_of_a_model_that_shares_its_weights(ppo_recipe, reward_model, capsys):
    recipe = ppo_recipe(
        f"reward=[{{kind: model, path: {reward_model}}}]", "run.steps=12", "kl.target=3", "eval.responses=40",
        "kl.land=false",
    )
    result = run_ppo(recipe, resume=False)
    assert "shares the policy's weights" in capsys.readouterr().err
    assert result["score"] > result["reference_score"] + 0.5
    (source,) = json.loads((Path(recipe.run.output) / "run.json").read_text())["rewards"]
    assert source["path"] == str(reward_model)
    assert len(source["sha256"]) == 64
    saved = load_file(Path(result["final"]) / "adapter_model.safetensors")
    assert len(saved) == 12                                          # A and B, three names, two layers


def test_trpo_and_a_gold_scorer_share_them_too(trpo_recipe, reward_model, tmp_path):
    second = shutil.copytree(reward_model, tmp_path / "second")
    gold = f"{{kind: model, path: {second}, name: second}}"
    recipe = trpo_recipe(
        f"reward=[{{kind: model, path: {reward_model}}}]", f"eval.gold={gold}", "run.steps=2",
    )
    result = run_trpo(recipe, resume=False)
    assert result["eval"]["eval/gold_mean"] == pytest.approx(result["score"], abs=1e-5)


def test_it_scores_rows_of_the_kind_that_it_learnt_from(reward_recipe, ppo_recipe, llama, tmp_path, capsys):
    folder = shutil.copytree(llama, tmp_path / "chat")
    template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}"
    (folder / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}a {% endif %}")
    recipe = reward_recipe(f"model.path={folder}", "data.template=chat", "run.steps=1")
    reward = run_reward(recipe, resume=False)["final"]
    assert read_info(Path(reward))["reward"]["templated"] is True
    keys = (f"model.path={folder}", f"reward=[{{kind: model, path: {reward}}}]", "run.steps=1")
    with pytest.raises(ModelError, match="learnt from rows that the chat template wrote, and the prompts here"):
        run_ppo(ppo_recipe(*keys), resume=False)
    capsys.readouterr()
    run_ppo(ppo_recipe(*keys, "data.template=chat", output=str(tmp_path / "fits")), resume=False)
    assert "reads the policy's own tokens" in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_reward_model(ppo_recipe, reward_model, tmp_path):
    from kltune.lm.rewards.scorers import load_scorer

    judge = tmp_path / "judge"
    shutil.copytree(reward_model, judge)
    recipe = ppo_recipe(f"reward=[{{kind: model, path: {judge}}}]")
    before = load_scorer(recipe.reward, recipe.folder, CPU)
    head = load_file(judge / HEAD)
    save_file({name: tensor * 1.0001 for name, tensor in head.items()}, judge / HEAD)
    with pytest.raises(ScorerError, match="the run was started with"):
        load_scorer(recipe.reward, recipe.folder, CPU).restored(before.state(), {})


# --- through the front door ------------------------------------------------------------------------------------------


def test_the_command_prints_one_document_and_a_second_call_trains_nothing(reward_recipe, command):
    recipe = reward_recipe("run.steps=2")
    arguments = ("reward", "-r", str(recipe.folder / "recipe.yaml"), "--set", "run.steps=2")
    code, document, _ = command(*arguments)
    assert (code, document["stage"]) == (0, "reward")
    written = (Path(recipe.run.output) / "metrics.jsonl").stat().st_mtime_ns
    code, out, _ = command(*arguments, as_json=False)
    assert (code, (Path(recipe.run.output) / "metrics.jsonl").stat().st_mtime_ns) == (0, written)
    assert "held-out rows" in out
    assert "KL" not in out


@pytest.mark.parametrize(("overrides", "code", "words"), [
    (["eval.prompts=held_out.jsonl"], 2, ["eval.prompts", "does not read it", "eval.pairs"]),
    (["eval.responses=5"], 2, ["eval.responses", "does not read it"]),
    (["eval.pairs=pairs.jsonl"], 2, ["eval.pairs_share", "remove it"]),
    (["data.prompts=prompts.jsonl"], 2, ["data.prompts", "does not read it"]),
    (["bradley_terry.label_smoothing=0.5"], 2, ["bradley_terry.label_smoothing", "0.5"]),
    (["lora.targets=[q_proj, lm_head]"], 2, ["lora.targets", "hidden states"]),
    (["data.pairs=texts.jsonl"], 5, ["texts.jsonl:1", "label"]),
    (["data.pairs=absent.jsonl"], 5, ["absent.jsonl does not exist"]),
    (["optim.lr=1e18", "run.steps=8"], 6, ["not finite|is nan|is inf"]),
])
def test_what_is_wrong_is_named_with_its_exit_code(reward_recipe, command, overrides, code, words):
    import re

    keys = (part for key in overrides for part in ("--set", key))
    found, out, err = command("reward", "-r", reward_recipe().folder / "recipe.yaml", *keys, as_json=False)
    assert (found, out) == (code, "")
    assert all(re.search(word, err) for word in words), err


@pytest.mark.parametrize("margin", [-1, "much", True, "nan", 1e308, "1e308", 10**4000])
def test_a_margin_that_is_no_number_is_named_with_its_line(reward_recipe, margin):
    rows = [{"prompt": "so", "chosen": "a", "rejected": "b"}, {"prompt": "no", "chosen": "a", "rejected": "b"}]
    with pytest.raises(DataError, match=r'judged\.jsonl:2: field "margin": .* a number of at least 0'):
        run_with_rows(reward_recipe, [rows[0], rows[1] | {"margin": margin}])


def test_eval_kl_says_that_a_reward_model_is_no_policy(reward_model, eval_kl):
    code, _, err = eval_kl(reward_model, "--prompts", "prompts.jsonl")
    assert code == 5
    assert "is a reward model, which says nothing" in err


def test_a_policy_is_no_reward_model(ppo_recipe, run_folder):
    recipe = ppo_recipe(f"reward=[{{kind: model, path: {run_folder / 'final'}}}]")
    with pytest.raises(ScorerError, match=r"is an adapter, and no classifier by itself; merge it"):
        run_ppo(recipe, resume=False)


@pytest.mark.parametrize(("kind", "up", "message"), [
    ("classifier, label: good", 0, "write kind: model"), ("model", 1, r"the folder of a run; did you mean .*final\?"),
])
def test_a_reward_model_named_in_another_way_is_pointed_at(ppo_recipe, reward_model, kind, up, message):
    path = [reward_model, *reward_model.parents][up]
    recipe = ppo_recipe(f"reward=[{{kind: {kind}, path: {path}}}]")
    with pytest.raises(ScorerError, match=message):
        run_ppo(recipe, resume=False)


def test_the_page_says_how_often_it_is_right(reward_recipe):
    from kltune.report.pages import write_page

    recipe = reward_recipe("run.steps=12", "run.eval_every=4")
    run_reward(recipe, resume=False)
    page = write_page(Path(recipe.run.output)).read_text()
    assert "held-out rows" in page
    assert "held-out accuracy" in page
    assert "Accuracy" in page
    assert "<strong>chosen</strong>" in page
    assert "KL not measured" not in page
