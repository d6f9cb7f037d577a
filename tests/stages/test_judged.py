"""Runs that an AI judge scores: what it is asked, what is written down, and what happens when it dies."""

import json
from collections import Counter
from pathlib import Path

import pytest

from kltune.errors import JudgeError, ScorerError
from kltune.lm.rewards import judge as judge_module
from kltune.recipe import load_recipe
from kltune.run.caches import StoredAnswers
from kltune.run.checkpoint import latest_checkpoint, saved_step
from kltune.stages.ppo import run_ppo
from tests.judges import Endpoint, Reply, part, serving
from tests.stages.conftest import PPO, RUNS, ran, read_jsonl, write_recipe
from tests.stages.test_resume import assert_same_run

KEY = "sesame-sesame"
STEPS = 4


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(judge_module, "FIRST_PAUSE", 0.001)


class Mortal:
    """Scores a's; after so many questions it is dead, until it is told otherwise. None lives for ever."""

    def __init__(self, dies_after: int | None = None, trouble: Reply | None = None):
        self.dies_after, self.trouble = dies_after, trouble or Reply(status=503)

    def __call__(self, number: int, question: str) -> Reply | str:
        if self.dies_after is not None and number >= self.dies_after:
            return self.trouble
        return json.dumps({"score": min(10, part(question, "response").count("a"))})


def rewarded_by(endpoint: Endpoint, **more) -> str:
    """The ``reward`` list as an override."""
    entry = {"kind": "judge", "url": endpoint.url, "model": "m", "retries": 1, "concurrency": 4, "name": "j"} | more
    return f"reward={json.dumps([entry])}"


def texts(endpoint: Endpoint) -> Counter:
    """How often each question got an answer."""
    return Counter(body["messages"][0]["content"] for body in endpoint.asked)


def everything_in(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_run_records_who_judged_and_never_the_key(ppo_recipe, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with serving(Mortal()) as endpoint:
        recipe = ppo_recipe(rewarded_by(endpoint, key_env="JUDGE_KEY"), f"run.steps={STEPS}", "run.eval_every=2")
        result = run_ppo(recipe, resume=False)
    folder = Path(result["output"])
    assert {headers["Authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
    rows = read_jsonl(folder / "metrics.jsonl")
    assert all(0.0 <= row["score/mean"] <= 1.0 for row in rows)
    assert 0.0 <= result["score"] <= 1.0
    counted = ("judge/j_asked", "judge/j_kept", "judge/j_unreadable", "judge/j_unanswered")
    assert all(set(counted) <= row.keys() for row in rows)
    assert rows[0]["judge/j_asked"] + rows[0]["judge/j_kept"] == 16
    assert sum(row["judge/j_unanswered"] + row["judge/j_unreadable"] for row in rows) == 0
    (who,) = json.loads((folder / "run.json").read_text())["rewards"]
    assert (who["kind"], who["url"], who["model"], who["range"]) == ("judge", endpoint.url, "m", "0 to 10")
    said = capsys.readouterr().err
    assert f"reward j: asks m at {endpoint.url}, with the key in JUDGE_KEY" in said
    assert KEY.encode() not in everything_in(folder) + said.encode()
    assert max(texts(endpoint).values()) == 1


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, llama):
    """A judge that may be told to die, the recipe file of a run that it scores, and how often each step asked it."""
    answer = Mortal()
    with serving(answer) as endpoint:
        file = write_recipe(tmp_path_factory.mktemp("judged"), PPO, llama)
        keys = (rewarded_by(endpoint), f"run.steps={STEPS}", "run.eval_every=2", "run.save_every=3")
        folder = Path(run_ppo(load_recipe(file, keys), resume=False)["output"])
        asked = [int(row["judge/j_asked"]) for row in read_jsonl(folder / "metrics.jsonl")]
        yield endpoint, file, keys, folder, [*asked, len(endpoint.asked) - sum(asked)]


@pytest.mark.parametrize("where", ["the first step", "a step", "an evaluation", "the end"])
def test_a_judge_that_dies_stops_the_run_and_loses_nothing(unbroken, tmp_path, where):
    endpoint, file, keys, whole, asked = unbroken
    dies_after, done = {      # answers that it still gives; steps done by then
        "the first step": (3, 0), "a step": (sum(asked[:2]) + 2, 2), "an evaluation": (sum(asked[:2]) - 2, 1),
        "the end": (sum(asked[:STEPS]) + 2, STEPS),
    }[where]
    endpoint.asked.clear()
    recipe = load_recipe(file, keys, output=str(tmp_path / "broken"))
    endpoint.answer.dies_after = dies_after
    with pytest.raises(JudgeError, match="HTTP 503") as caught:
        run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 75
    assert f"--resume goes on {f'after step {done}' if done else 'from the start'}" in str(caught.value)
    folder = tmp_path / "broken"
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert len(read_jsonl(folder / "metrics.jsonl")) == done
    newest = latest_checkpoint(folder)
    assert (saved_step(newest) if newest else 0) == done
    in_vain = len(endpoint.asked) - dies_after
    endpoint.answer.dies_after = None
    assert run_ppo(recipe, resume=True)["status"] == "finished"
    assert_same_run(folder, whole, STEPS)
    assert len(endpoint.asked) == sum(asked) + in_vain


def test_a_judge_that_dies_while_its_scores_are_standardised(ppo_recipe):
    answer = Mortal(3)
    with serving(answer) as endpoint:
        recipe = ppo_recipe(rewarded_by(endpoint, normalize=True), "run.steps=1")
        with pytest.raises(JudgeError, match="HTTP 503"):
            run_ppo(recipe, resume=False)
        in_vain = len(endpoint.asked) - 3
        answer.dies_after = None
        run_ppo(recipe, resume=True)
    assert in_vain > 0
    answered = Counter(dict.fromkeys(texts(endpoint), 1))
    assert sum((texts(endpoint) - answered).values()) <= in_vain


def test_a_judge_that_talks_nonsense_ends_with_5_and_the_run_is_saved(ppo_recipe):
    answer = Mortal(20, Reply("What a lovely day."))
    with serving(answer) as endpoint:
        recipe = ppo_recipe(rewarded_by(endpoint), "run.steps=3", "run.eval_every=100")
        with pytest.raises(ScorerError, match="What a lovely day") as caught:
            run_ppo(recipe, resume=False)
    assert caught.value.exit_code == 5
    assert "--resume goes on after step 1" in str(caught.value)
    assert saved_step(latest_checkpoint(Path(recipe.run.output))) == 1


def test_the_command_ends_with_75_and_one_message(ppo_recipe, command):
    with serving(Mortal(0)) as endpoint:
        file, reward = ppo_recipe().folder / "recipe.yaml", rewarded_by(endpoint, retries=0)
        code, out, err = command("ppo", "--recipe", file, "--set", reward, as_json=False)
    assert (code, out) == (75, "")
    assert "kltune: error: reward j: m at http://127.0.0.1" in err


def test_a_gold_judge_is_asked_about_evaluations_only(ppo_recipe):
    with serving(Mortal()) as endpoint:
        gold = f"eval.gold={{kind: judge, url: {endpoint.url!r}, model: m, name: gold}}"
        result = run_ppo(ppo_recipe(gold, "run.steps=2", "run.eval_every=1"), resume=False)
    folder = Path(result["output"])
    rows = read_jsonl(folder / "metrics.jsonl")
    assert "eval/gold_mean" in rows[0]
    assert 0.0 <= result["eval"]["eval/gold_mean"] <= 1.0
    asked = [row["judge/gold_asked"] for row in rows]
    assert 10.0 < asked[0] <= 20.0      # of the policy's ten answers and of the reference's, where those are others
    assert asked[1] == 0.0
    assert max(texts(endpoint).values()) == 1


@pytest.mark.parametrize(("stage", "judge"), [("ppo", "gold"), ("sft", "gold"), ("trpo", "j")])
def test_a_judge_that_dies_costs_no_step_in_any_stage(request, tmp_path, stage, judge):
    make, run, answer = request.getfixturevalue(f"{stage}_recipe"), RUNS[stage], Mortal()
    with serving(answer) as endpoint:
        gold = f"eval.gold={{kind: judge, url: {endpoint.url!r}, model: m, name: gold, retries: 0}}"
        keys = (gold if judge == "gold" else rewarded_by(endpoint), "run.steps=7", "run.eval_every=2")
        unbroken, broken = (make(*keys, output=str(tmp_path / name)) for name in ("unbroken", "broken"))
        asked = [int(row[f"judge/{judge}_asked"]) for row in ran(unbroken)[1]]
        assert asked[5] > 0
        assert judge == "j" or [n > 0 for n in asked] == [False, True] * 3 + [False]
        answer.dies_after = len(endpoint.asked) + sum(asked[:5])      # in the third evaluation, or in step 6
        with pytest.raises(JudgeError, match="Nothing is lost: --resume goes on after step 5") as caught:
            run(broken, resume=False)
        assert caught.value.exit_code == 75
        assert json.loads((tmp_path / "broken" / "run.json").read_text())["status"] == "interrupted"
        assert saved_step(latest_checkpoint(tmp_path / "broken")) == 5
        answer.dies_after = None
        run(broken, resume=True)
    assert_same_run(tmp_path / "broken", tmp_path / "unbroken", 7)


def test_answers_survive_a_line_that_was_cut_short(tmp_path):
    answers = StoredAnswers(tmp_path)
    answers.record("a", 1.0)
    answers.record("b", 0.5)
    whole = answers.path.read_bytes()
    answers.path.write_bytes(whole[:-4])
    again = StoredAnswers(tmp_path)
    assert (again.get("a"), again.get("b")) == (1.0, None)
    again.record("c", 0.25)
    last = StoredAnswers(tmp_path)
    assert (len(last), last.get("a"), last.get("c")) == (2, 1.0, 0.25)
    assert not StoredAnswers(tmp_path / "nowhere").path.exists()
