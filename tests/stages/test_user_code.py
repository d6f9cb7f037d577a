"""Reward code is the user's own: whatever it does ends with 5 and its place, loses no step, and leaves stdout alone."""

import re
from pathlib import Path

import pytest

from kltune.errors import DivergedError, ScorerError
from kltune.run.checkpoint import latest_checkpoint, saved_step
from kltune.stages.ppo import run_ppo
from tests.stages.conftest import RUNS, read_jsonl
from tests.stages.test_resume import assert_same_run

STEPS = 4
# Whatever a function may do instead of returning numbers: the body of ``trouble``, and what the message says of it.
TROUBLES = {
    "nan": ("return [float('nan')] * len(responses)", "got nan, wanted a finite number"),
    "infinite": ("return [1e39] * len(responses)", r"got 1e\+39, wanted a finite number"),
    "thousands of digits": ("return [10**5000] * len(responses)", "got a int that cannot be shown, wanted a finite"),
    "a long text": ("return ['x' * 9999] * len(responses)", r"got 'x{59}… \(str\), wanted a finite number"),
    "no repr": ("return [Odd()] * len(responses)", "got a Odd that cannot be shown"),
    "no text": ("raise Mute()", r"raised Mute: a Mute that cannot be shown \(.*rewards\.py:\d+, in trouble\)"),
    "nothing": ("return None", "returned NoneType, wanted a list"),
    "too few": ("return [0.0]", "returned 1 scores for"),
    "raises": ("raise KeyError('colour')", r"raised KeyError: 'colour' \(.*rewards\.py:\d+, in trouble\)"),
    "in a helper": ("return helper(responses)", r"raised ZeroDivisionError: .*rewards\.py:\d+, in helper\)"),
    "sys.exit": ("sys.exit(0)", r"raised SystemExit: 0 \(.*rewards\.py:\d+, in trouble\)"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError", "raised CancelledError"),
    "a lazy list": ("return Lazy(responses)", "raised RuntimeError: not yet"),
}
HEAD = '''
import os, subprocess, sys
class Odd:
    def __repr__(self): raise ValueError
class Mute(Exception):
    def __str__(self): raise ValueError
class Lazy(list):
    def __len__(self): raise RuntimeError("not yet")
def helper(responses):
    for _ in responses:
        1 / 0
CALLS = []
def score(prompts, responses):
    """How often a response says a; from some call on, trouble."""
    CALLS.append(None)
    if len(CALLS) > int(os.environ.get("GOOD_CALLS", 10**9)):
        return trouble(responses)
    return [float(response.count("a")) for response in responses]
def trouble(responses):
    %s
'''


@pytest.fixture
def make_troubled(request, monkeypatch):
    """A recipe of a stage whose reward is fine for so many calls; its file's line is the same for every trouble."""
    def make(stage: str, body: str, good_calls: int, *overrides: str, output: Path):
        make_recipe = request.getfixturevalue(f"{stage}_recipe")
        (make_recipe().folder / "rewards.py").write_text(HEAD % body)
        monkeypatch.setenv("GOOD_CALLS", str(good_calls))
        return make_recipe(f"run.steps={STEPS}", *overrides, output=str(output))

    return make


@pytest.mark.parametrize("trouble", TROUBLES)
def test_whatever_a_reward_function_does_ends_with_5_and_is_named(make_troubled, tmp_path, trouble):
    body, said = TROUBLES[trouble]
    with pytest.raises(ScorerError, match=f"^reward score: .*{said}") as caught:
        run_ppo(make_troubled("ppo", body, 2, output=tmp_path / "run"), resume=False)
    assert caught.value.exit_code == 5
    assert "Nothing is lost: --resume goes on after step 2." in str(caught.value)
    assert len(str(caught.value)) < 700
    assert saved_step(latest_checkpoint(tmp_path / "run")) == 2


# Calls in a run of 4 steps that evaluates after 2: of two steps, of the policy's and the reference's held-out answers.
DONE_AFTER = {0: 0, 1: 1, 2: 1, 3: 1, 5: 3, 6: 4}


@pytest.mark.parametrize(("stage", "good_calls", "done"), [
    pytest.param(stage, calls, done, marks=() if calls == (0, 3, 6)[number] else pytest.mark.stress)
    for number, stage in enumerate(("ppo", "trpo", "online")) for calls, done in DONE_AFTER.items()
])
def test_an_error_of_scoring_loses_no_step_in_any_stage(make_troubled, tmp_path, monkeypatch, stage, good_calls, done):
    more, run = ("run.eval_every=2",), RUNS["dpo" if stage == "online" else stage]
    body = "raise OSError('the network is down')"
    run(make_troubled(stage, body, 10**9, *more, output=tmp_path / "whole"), resume=False)
    broken = make_troubled(stage, body, good_calls, *more, output=tmp_path / "broken")
    with pytest.raises(ScorerError, match="the network is down") as caught:
        run(broken, resume=False)
    assert f"--resume goes on {f'after step {done}' if done else 'from the start'}." in str(caught.value)
    assert len(read_jsonl(tmp_path / "broken" / "metrics.jsonl")) == done
    monkeypatch.setenv("GOOD_CALLS", str(10**9))
    run(broken, resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "whole", STEPS)


def test_a_gold_function_that_fails_loses_no_step(sft_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("GOOD_CALLS", "2")
    recipe = sft_recipe("eval.gold={kind: function, path: 'rewards.py:score'}", "run.eval_every=1")
    (recipe.folder / "rewards.py").write_text(HEAD % "return None")
    with pytest.raises(ScorerError, match="goes on after step 1"):
        RUNS["sft"](recipe, resume=False)
    assert saved_step(latest_checkpoint(Path(recipe.run.output))) == 1


@pytest.mark.parametrize(("code", "said"), [
    ("import sys\nsys.exit(0)\n", r"SystemExit: 0 \(.*rewards\.py:2, in <module>\)"),
    ("raise KeyError('k')\n", r"KeyError: 'k' \(.*rewards\.py:1, in <module>\)"),
    ("import helpers\n", r"SystemExit: 3 \(.*helpers\.py:2, in <module>\)"),
    ("def score(:\n", r"SyntaxError: .*rewards\.py, line 1"),
])
def test_a_module_that_ends_the_process_or_raises_ends_with_5_and_its_line(ppo_recipe, command, code, said):
    folder = ppo_recipe().folder
    (folder / "helpers.py").write_text("import sys\nsys.exit(3)\n")
    (folder / "rewards.py").write_text(code)
    status, out, err = command("ppo", "--recipe", folder / "recipe.yaml")
    assert (status, out) == (5, "")
    assert re.search(said, err)


@pytest.mark.parametrize("weight", ["10", "-10"])
def test_a_total_of_finite_rewards_that_overflows_is_named(ppo_recipe, weight):
    recipe = ppo_recipe(f"reward.0.weight={weight}")
    (recipe.folder / "rewards.py").write_text("def score(prompts, responses):\n    return [1e38 for _ in responses]\n")
    with pytest.raises(DivergedError, match=rf"reward: the score {weight} · score: found -?inf") as caught:
        run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 6
    assert "Lower reward.N.weight, or scale the reward down. Nothing is lost" in str(caught.value)


@pytest.mark.parametrize("values", ["[1e38] * len(responses)", "[3e38 * (-1) ** row for row in range(len(responses))]"])
def test_scores_that_overflow_together_lose_no_step(make_troubled, tmp_path, values):
    recipe = make_troubled("ppo", f"return {values}", 2, "reward.0.weight=10", output=tmp_path / "run")
    with pytest.raises(DivergedError, match=r"nothing of it was saved.*--resume goes on after step 2\."):
        run_ppo(recipe, resume=False)
    assert saved_step(latest_checkpoint(tmp_path / "run")) == 2


def test_finite_scores_whose_spread_is_infinite_are_named(ppo_recipe):
    recipe = ppo_recipe()
    code = "def score(prompts, responses):\n    return [3e38 * (-1) ** row for row in range(len(responses))]\n"
    (recipe.folder / "rewards.py").write_text(code)
    with pytest.raises(DivergedError, match=r"the spread of the scores: found (nan|inf)"):
        run_ppo(recipe, resume=False)


@pytest.mark.parametrize(("stage", "reward", "warned"), [
    ("ppo", "flat", True), ("trpo", "flat", True), ("online", "flat", True), ("ppo", "score", False),
])
def test_scores_that_are_all_equal_are_warned_of_once_and_the_function_named(
    request, capsys, stage, reward, warned
):
    recipe = request.getfixturevalue(f"{stage}_recipe")("run.steps=4", f"reward.0.path=rewards.py:{reward}")
    RUNS[recipe.stage](recipe, resume=False)
    said = [line for line in capsys.readouterr().err.splitlines() if "all responses score alike" in line]
    assert len(said) == warned
    assert all(line.startswith("warning: in each of the first 3 steps") for line in said)
    assert all("reward flat tells them apart by nothing" in line for line in said)
