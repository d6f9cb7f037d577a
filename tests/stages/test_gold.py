"""Runs that watch a second scorer: what they write, when they warn, and how they end at its peak."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kltune.errors import RecipeError
from kltune.stages.dpo import run_dpo
from kltune.stages.ppo import run_ppo
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo
from kltune.train.evaluation import finish as finishing
from tests.stages.conftest import HELD_OUT, PROMPTS, ran, read_jsonl, rows_of, write_rows
from tests.stages.test_resume import assert_same_run

SAID = ("distinct_1", "distinct_2", "distinct_2_adjusted", "self_bleu", "distinct_2_per_input",
        "distinct_2_across_input", "duplicate_fraction", "entropy_nats_per_token", "response_tokens", "end_fraction")
SCORED = ("mean", "stderr", "z", "z_stderr")
GREEDY = ("kl.control=fixed", "kl.beta=0", "run.steps=16", "run.eval_every=3", "eval.prompts=many.jsonl",
          "eval.responses=130", "ppo.baseline=rloo",
          'eval.gold={kind: function, path: "rewards.py:few"}')


@pytest.fixture
def greedy(ppo_recipe, tmp_path):
    """A function from overrides to a PPO recipe with no price on KL, whose gold score wants few a's."""
    return lambda *keys, output="run": ppo_recipe(*GREEDY, *keys, output=str(tmp_path / output))


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_an_evaluation_writes_every_key_and_the_result_names_gold(greedy):
    recipe = greedy("run.steps=2", "run.eval_every=1", "eval.texts=held_out_texts.jsonl")
    result = run_ppo(recipe, resume=False)
    names = [*SAID, "gold_gap", *(f"{judge}_{part}" for judge in ("score", "gold") for part in SCORED)]
    wanted = {f"eval/{who}{name}" for name in names for who in ("", "reference_")}
    wanted |= {"eval/tax_nats_per_token", "eval/tax_stderr", "eval/texts_nats_per_token",
               "eval/reference_texts_nats_per_token"}
    first = rows_of(recipe)[0]
    for row in (first, result["eval"]):
        assert wanted <= row.keys()
        assert {name for name in wanted if row[name] is None} == set()
    assert result["gold"] == result["eval"]["eval/gold_mean"]
    assert result["gold_stderr"] == result["eval"]["eval/gold_stderr"]
    assert result["reference_gold"] == first["eval/reference_gold_mean"]
    assert result["eval"]["eval/tax_nats_per_token"] == pytest.approx(
        result["eval"]["eval/texts_nats_per_token"] - result["eval"]["eval/reference_texts_nats_per_token"], abs=1e-6
    )


def test_with_one_response_to_a_prompt_there_is_nothing_within_one(greedy):
    first = ran(greedy("run.steps=2", "run.eval_every=1", "eval.responses=8"))[1][0]
    assert first["eval/distinct_2_per_input"] is None
    assert first["eval/distinct_2_across_input"] == first["eval/distinct_2"]


def test_supervised_stages_watch_too(sft_recipe, dpo_recipe, trpo_recipe):
    for run, recipe in ((run_sft, sft_recipe), (run_dpo, dpo_recipe), (run_trpo, trpo_recipe)):
        made = recipe("run.steps=2", "run.eval_every=1", 'eval.gold={kind: function, path: "rewards.py:few"}')
        result = run(made, resume=False)
        first = read_jsonl(Path(made.run.output) / "metrics.jsonl")[0]
        assert result["gold"] is not None
        assert ("eval/score_z" in first) == (run is run_trpo)
        assert {f"eval/{name}" for name in SAID} | {"eval/gold_z"} <= first.keys()


def test_what_is_trained_on_is_not_called_held_out(ppo_recipe, sft_recipe, dpo_recipe, capsys):
    told = "{} of {} held-out {} are among the training rows"
    for run, recipe, keys, words, apart in (
        (run_ppo, ppo_recipe, ("eval.prompts=prompts.jsonl",), told.format(12, 12, "prompts"), False),
        (run_ppo, ppo_recipe, ("data.prompts=both.jsonl",), told.format(1, 10, "prompts"), True),
        (run_sft, sft_recipe, ("eval.texts=texts.jsonl",), told.format(12, 12, "texts"), False),
        (run_sft, sft_recipe, ("eval.prompts=prompts.jsonl",), told.format(12, 12, "prompts"), False),
        (run_dpo, dpo_recipe, ("eval.pairs=pairs.jsonl",), told.format(24, 24, "responses"), False),
        (run_dpo, dpo_recipe, ("eval.pairs=held_out_pairs.jsonl",), None, True),
    ):
        made = recipe("run.steps=1", *keys)
        write_rows(Path(made.run.output).parent / "both.jsonl", [{"prompt": text} for text in (*PROMPTS, HELD_OUT[0])])
        result, said = run(made, resume=False), capsys.readouterr().err
        shutil.rmtree(made.run.output)
        assert result["held_out"] is apart
        assert words in said if words else "among the training rows" not in said


def test_the_tax_is_that_of_eval_kl(sft_recipe, eval_kl):
    recipe = sft_recipe("run.steps=3")
    found = run_sft(recipe, resume=False)["eval"]
    texts = recipe.eval.texts
    code, document, _ = eval_kl(recipe.run.output, "--texts", texts, "--responses", 10)
    assert code == 0
    assert document["alignment_tax"]["nats_per_token"] == pytest.approx(found["eval/tax_nats_per_token"], abs=1e-6)
    assert document["alignment_tax"]["stderr"] == pytest.approx(found["eval/tax_stderr"], abs=1e-6)
    assert found["eval/tax_nats_per_token"] != 0.0


def test_a_falling_gold_score_is_warned_of_once_and_the_run_goes_on(greedy, capsys):
    result = run_ppo(greedy(), resume=False)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "the gold score fell" in line]
    assert len(warnings) == 1
    assert "while the score that is trained on rose from" in warnings[0]
    assert "Raise kl.beta, or write kl.control: target; mend the reward" in warnings[0]
    assert (result["steps"], result["final_step"], result["stopped_early"]) == (16, 16, None)


def test_a_run_may_end_at_the_peak_of_gold(greedy, capsys):
    recipe = greedy("eval.stop_at_gold_peak=true", "run.save_every=1", "run.keep=50")
    result = run_ppo(recipe, resume=False)
    folder, stopped = Path(recipe.run.output), result["stopped_early"]
    rows = {row["step"]: row for row in rows_of(recipe)}
    peak = max((step for step in rows if "eval/gold_mean" in rows[step]), key=lambda step: rows[step]["eval/gold_mean"])
    assert 0 < peak < stopped["step"] == max(rows) == result["steps"] < 16
    assert (stopped["gold_peak_step"], result["final_step"]) == (peak, peak)
    assert stopped["gold_at_stop"] < stopped["gold_at_peak"] == rows[peak]["eval/gold_mean"] == result["gold"]
    assert stopped["score_at_stop"] > stopped["score_at_peak"] == rows[peak]["eval/score_mean"]
    final, kept = adapter(result["final"]), adapter(folder / f"checkpoints/step-{peak:06d}")
    assert all(torch.equal(final[name], kept[name]) for name in kept)
    assert result["status"] == json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert f"stopped after step {max(rows)} of 16" in capsys.readouterr().err


def test_where_every_step_makes_gold_worse_the_reference_is_final(greedy):
    result = run_ppo(greedy("eval.gold.path=rewards.py:none", "eval.stop_at_gold_peak=true"), resume=False)
    assert (result["stopped_early"]["gold_peak_step"], result["final_step"]) == (0, 0)
    assert result["kl"]["nats_per_response"] == pytest.approx(0.0, abs=1e-6)
    assert result["gold"] == pytest.approx(result["reference_gold"])


def test_the_peak_is_held_to_the_cap_as_any_final_is(greedy):
    plain = run_ppo(greedy("eval.stop_at_gold_peak=true", output="plain"), resume=False)
    cap = 0.5 * plain["kl"]["nats_per_response"]
    result = run_ppo(greedy("eval.stop_at_gold_peak=true", f"kl.hard_cap={cap}", output="capped"), resume=False)
    assert result["kl"]["ci95"][1] <= cap


def test_a_run_that_was_killed_while_it_ended_at_its_peak_ends_there_again(greedy, monkeypatch, tmp_path):
    broken, unbroken = (greedy("eval.stop_at_gold_peak=true", output=name) for name in ("broken", "unbroken"))
    done = run_ppo(unbroken, resume=False)

    def killed(*_, **__):
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(finishing, "save_final", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run_ppo(broken, resume=False)
    assert run_ppo(broken, resume=True)["stopped_early"] == done["stopped_early"]
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", done["steps"])


def test_only_a_stage_that_trains_on_scores_ends_at_a_peak(sft_recipe, reward_recipe):
    for recipe in (sft_recipe, reward_recipe):
        with pytest.raises(RecipeError, match=r"eval\.stop_at_gold_peak.*does not read it"):
            recipe("eval.stop_at_gold_peak=true")
