"""``kltune frontier`` on real runs of the tiny model: fresh scores, best of n, the page, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def frontier(command):
    return partial(command, "frontier")


def test_a_run_is_a_point_as_it_measured_itself(frontier, run_folder, tmp_path):
    code, document, _ = frontier(run_folder, "--budget", 50, "--output", tmp_path / "out", "--best-of", 8)
    assert code == 0
    result = json.loads((run_folder / "result.json").read_text())
    point, = document["points"]
    assert (point["kl"], point["score"]) == (result["kl"]["nats_per_response"], result["score"])
    assert (point["curve"], point["setting"]) == ("ppo target", "kl.target=2")
    assert document["reference"]["score"] == result["reference_score"]
    assert document["fits"][0]["claim"].startswith("not claimed: 1 point of 1 run")
    assert document["pick"]["setting"] == "kl.target=2"
    anchor = document["best_of_n"]
    assert [row["n"] for row in anchor["points"]] == [1, 2, 4, 8]
    assert (anchor["prompts"], anchor["responses_per_prompt"]) == (10, 8)
    scores = [row["score"] for row in anchor["points"]]
    assert scores == sorted(scores)
    assert all(row["kl_with_ties"] <= row["kl_bound"] for row in anchor["points"])
    assert "by_prompt" not in anchor
    assert document["settings"][0]["efficiency"] == pytest.approx(
        (point["score"] - result["reference_score"]) / (anchor["sigma"]["score"] * (2 * point["kl"]) ** 0.5)
    )
    assert json.loads((tmp_path / "out" / "frontier.json").read_text()) == document
    assert (tmp_path / "out" / "frontier.svg").read_text().startswith("<svg")
    page = (tmp_path / "out" / "frontier.html").read_text()
    assert "prefers-color-scheme: dark" in page
    assert "Budget 50 nats: pick ppo target, kl.target=2" in page
    assert not any(word in page for word in ("<script", "http://localhost", "https://"))


def test_without_best_of_n_no_model_is_loaded(frontier, run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    shutil.rmtree(copy / "final")      # a model that is not there cannot be loaded
    code, text, err = frontier(copy, "--best-of", 0, as_json=False)
    assert (code, err) == (0, "")
    assert "ppo target  kl.target=2  1" in text


GOLD = "def gold(prompts, responses):\n    return [-float(len(r)) for r in responses]\n"


def test_gold_scores_fresh_responses_of_the_run_and_of_the_reference(frontier, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(GOLD)
    code, document, _ = frontier(run_folder, "--gold", "judge.py:gold", "--responses", 30, "--best-of", 4)
    assert code == 0
    assert (document["judge"], document["measured"]) == ("gold", "afresh")
    point, reference = document["points"][0], document["reference"]
    assert -6 <= point["gold"] <= 0
    assert -6 <= reference["gold"] <= 0
    assert point["gold_stderr"] > 0
    recorded = json.loads((run_folder / "result.json").read_text())
    assert point["kl"] != recorded["kl"]["nats_per_response"]      # 30 responses, not 10
    assert point["kl"] == pytest.approx(recorded["kl"]["nats_per_response"], rel=0.5)
    assert {"score", "gold"} == set(document["best_of_n"]["sigma"])
    # the same seed, the same numbers
    assert frontier(run_folder, "--gold", "judge.py:gold", "--responses", 30, "--best-of", 4)[1] == document


def test_an_alpha_curve_stands_beside_its_run(command, frontier, run_folder, tmp_path):
    recipe = run_folder.parent / "recipe.yaml"
    command("project", run_folder, "--curve", "-r", recipe, "--responses", 20, "-o", tmp_path / "c")
    code, document, _ = frontier(run_folder, tmp_path / "c", "--at", 1, "--best-of", 0)
    assert code == 0
    curves = {row["curve"] for row in document["settings"]}
    assert curves == {"ppo target", "alpha curve of ppo target, kl.target=2"}
    assert set(document["at"][0]["curves"]) == curves
    assert len(document["settings"]) == 11
    code, text, _ = frontier(run_folder, tmp_path / "c", "--responses", 20, "--best-of", 0, as_json=False)
    assert code == 0
    assert "not measured afresh, but as they were: alpha curve of ppo target" in text


def test_a_reward_that_is_no_longer_what_it_was_is_refused(frontier, run_folder, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_folder, copy)
    record = json.loads((copy / "run.json").read_text())
    record["rewards"][0]["sha256"] = "0" * 64
    (copy / "run.json").write_text(json.dumps(record))
    code, _, err = frontier(copy)
    assert code == 5
    assert "was trained on" in err
    code, document, _ = frontier(copy, "--recipe", run_folder.parent / "recipe.yaml", "--best-of", 0)
    assert code == 0      # scored afresh, by what is there now
    assert document["measured"] == "afresh"


@pytest.mark.parametrize(("arguments", "code", "wanted"), [
    (["--budget", "nan"], 2, "--budget"), (["--gold", "{kind: oracle}"], 2, "--gold"),
    (["--recipe", "no.yaml"], 2, "no.yaml"),
    (["--gold", "missing.py:gold"], 5, "missing.py"),
    (["--gold", "{kind: judge, url: 'http://127.0.0.1:9/v1', model: m, mode: pair}"], 2, "wanted score"),
    (["--judge", "http://127.0.0.1:9/v1"], 2, "wanted URL#MODEL"),
    (["--judge", "{kind: judge, url: 'http://me@127.0.0.1:9/v1', model: m}"], 2, "a user, a query or a fragment"),
])
def test_what_could_not_end_well(frontier, run_folder, arguments, code, wanted):
    left, _, err = frontier(run_folder, *arguments)
    assert left == code
    assert wanted in err


def test_a_folder_that_is_no_run(frontier, tmp_path):
    code, _, err = frontier(tmp_path)
    assert code == 5
    assert "is no run, no sweep and no curve" in err


def test_a_win_rate_is_a_third_axis(frontier, run_folder, tmp_path, monkeypatch):
    """Asked for of every run afresh, it has a column, a picture and an interval; where nothing scores, it picks."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text((run_folder.parent / "rewards.py").read_text())
    asked = ["--judge", "rewards.py:score", "--responses", 40, "--best-of", 0]
    code, document, _ = frontier(run_folder, *asked, "--output", "out")
    assert code == 0
    point, setting = document["points"][0], document["settings"][0]
    assert point["win_rate"] > 0.5 + point["win_rate_stderr"]       # it was trained to say a
    assert setting["win_rate_ci95"][0] < setting["win_rate"] < setting["win_rate_ci95"][1]
    assert document["judge"] == "score"
    page = Path("out/frontier.html").read_text()
    assert page.count("<figure") == 2
    assert "<th>win rate</th>" in page
    text = frontier(run_folder, *asked, as_json=False)[1]
    assert "win rate" in text

    unscored = tmp_path / "unscored"
    shutil.copytree(run_folder, unscored)
    result = json.loads((unscored / "result.json").read_text())
    result |= {"score": None, "win_rate": 0.7, "win_rate_ci95": [0.6, 0.8],
               "eval": {key: value for key, value in result["eval"].items() if "score" not in key}}
    (unscored / "result.json").write_text(json.dumps(result))
    code, document, _ = frontier(unscored, "--best-of", 0, "--budget", 50, "--at", 1)
    assert code == 0
    assert (document["judge"], document["pick"]["win_rate"], document["pick"]["reference"]) == ("win_rate", 0.7, 0.5)
    assert document["fits"] == []


def test_win_rates_of_different_judges_are_left_out(frontier, run_folder, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, model in zip(folders, ("kind", "strict"), strict=True):
        shutil.copytree(run_folder, folder)
        result = json.loads((folder / "result.json").read_text()) | {"win_rate": 0.7, "win_rate_ci95": [0.6, 0.8]}
        (folder / "result.json").write_text(json.dumps(result))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe["reward"][0]["path"] = "rewards.py:score"        # what somebody wrote names no file elsewhere
        shutil.copy(run_folder.parent / "rewards.py", folder)
        recipe["eval"]["judge"] = {"kind": "judge", "url": "http://127.0.0.1:8000/v1", "model": model, "mode": "pair"}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    alone = frontier(folders[0], "--best-of", 0)[1]
    assert alone["points"][0]["win_rate"] == 0.7
    code, document, _ = frontier(*folders, "--best-of", 0)
    assert code == 0
    assert [point["win_rate"] for point in document["points"]] == [None, None]
    assert any("win rates are by different judges" in note for note in document["notes"])
