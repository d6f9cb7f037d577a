"""Runs as points: which curve a recipe is on, seeds together, references that differ, and what to pick."""

import json
import math
from pathlib import Path

import pytest

from kltune.errors import CheckpointError
from kltune.recipe import dump_recipe
from kltune.report.frontier.points import (
    check_one_reference,
    check_one_reward,
    differing_measures,
    family,
    find_sources,
    points_of,
    setting_key,
)
from kltune.report.frontier.pooling import Setting, curves_at, fits, pick, pooled

REFERENCE = {"path": "base", "sha256": "a" * 64, "tokenizer_sha256": "b" * 64, "template_sha256": "c" * 64}
REWARDS = [{"name": "score", "weight": 1.0, "kind": "function", "path": "rewards.py:score", "sha256": "d" * 64}]


@pytest.fixture
def make_run(make_recipe):
    """A finished run that was never run: its overrides, KL and score, and what run.json says otherwise."""

    def make(name: str, *overrides: str, kl: float = 1.0, score: float | None = 0.5, steps=(), **record) -> str:
        recipe = make_recipe(*overrides, output=name)
        folder = Path(recipe.run.output)
        folder.mkdir(parents=True)
        about = {
            "schema": "kltune.run/1", "stage": recipe.stage, "status": "finished", "seed": recipe.run.seed,
            "reference": REFERENCE, "rewards": REWARDS,
        }
        (folder / "run.json").write_text(json.dumps(about | record))
        (folder / "recipe.yaml").write_text(dump_recipe(recipe))
        (folder / "result.json").write_text(json.dumps({
            "kl": {"nats_per_response": kl, "stderr": 0.1, "ci95": [kl - 0.2, kl + 0.2]}, "score": score,
            "target": recipe.kl.target if recipe.kl.control == "target" else None, "alpha": 1.0,
            "eval": {"eval/score_mean": score, "eval/score_stderr": 0.05, "eval/reference_score_mean": 0.1,
                     "eval/reference_score_stderr": 0.02, "eval/gold_mean": 2.0, "eval/gold_stderr": 0.3},
        }))
        rows = [{"step": step, "kl/ref_nats_per_response": nats} for step, nats in enumerate(steps, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return make


def curve(folder: Path, checkpoint: str, **more) -> str:
    """The output of ``kltune project --curve``."""
    folder.mkdir()
    looks = [
        {"alpha": a, "purpose": "curve", "nats_per_response": 4 * a * a, "stderr": 0.1, "ci": [0.0, 5.0], "score": a,
         "score_stderr": 0.05} for a in (0.0, 0.5, 1.0)
    ]
    looks.append(looks[-1] | {"purpose": "search", "alpha": 0.7})
    document = {"schema": "kltune.project/1", "checkpoint": checkpoint, "reference": REFERENCE, "looks": looks} | more
    (folder / "project.json").write_text(json.dumps(document))
    return str(folder)


def test_a_point_says_what_its_run_measured(make_run):
    path = make_run("a", "kl.target=2", kl=1.9, steps=(0.2, 1.6, 1.7, 2.2))
    point, = points_of(find_sources([path]))
    assert (point.kl, point.kl_stderr, point.kl_ci95) == (1.9, 0.1, [1.7, 2.1])
    assert (point.score, point.score_stderr, point.gold, point.gold_stderr) == (0.5, 0.05, 2.0, 0.3)
    assert (point.curve, point.setting, point.seed) == ("ppo target", "kl.target=2", 0)
    assert point.steps_to_target == 3      # 0.85 × 2 is reached by 1.7


def test_curves_are_named_by_stage_and_control_and_by_what_else_differs(make_run):
    paths = [
        make_run("a", "kl.target=2"),
        make_run("b", "kl.target=4", "run.seed=1", "run.save_every=7"),
        make_run("c", "kl.target=4", "ppo.epochs=2"),
        make_run("d", "kl.control=fixed", "kl.beta=0.2"),
        make_run("e", "kl.control=fixed", "kl.beta=0.1", "eval.responses=7"),
    ]
    points = points_of(find_sources(paths))
    assert [(point.curve, point.setting) for point in points] == [
        ("ppo target, ppo.epochs=4", "kl.target=2"), ("ppo target, ppo.epochs=4", "kl.target=4"),
        ("ppo target, ppo.epochs=2", "kl.target=4"), ("ppo fixed", "kl.beta=0.2"), ("ppo fixed", "kl.beta=0.1"),
    ]


@pytest.mark.parametrize(("settings", "name", "own_key"), [
    ({"stage": "trpo", "kl.control": "target", "kl.beta": "auto"}, "trpo", "kl.target"),
    ({"stage": "trpo", "kl.control": "fixed", "kl.beta": 0.1}, "trpo fixed", "kl.beta"),
    ({"stage": "dpo", "kl.control": "fixed", "kl.beta": 0.0, "dpo.loss": "sigmoid", "dpo.source": "file"}, "dpo",
     "dpo.beta"),
    ({"stage": "dpo", "kl.control": "target", "kl.beta": "auto", "dpo.loss": "ipo", "dpo.source": "online"},
     "dpo online ipo target", "kl.target"),
    ({"stage": "sft"}, "sft", "run.steps"),
])
def test_families(settings, name, own_key):
    assert (family(settings), setting_key(settings)) == (name, own_key)


def test_seeds_are_one_point_with_the_error_between_them(make_run):
    paths = [make_run(str(s), "kl.target=2", f"run.seed={s}", kl=2.0 + s, score=0.1 * s) for s in range(3)]
    setting, = pooled(points_of(find_sources(paths)))
    assert (setting.seeds, setting.kl, setting.score) == (3, 3.0, pytest.approx(0.1))
    assert setting.kl_stderr == pytest.approx(1.0 / math.sqrt(3))
    assert setting.kl_ci95 == (pytest.approx(1.8), pytest.approx(4.2))      # all their intervals
    assert setting.runs == tuple(paths)
    # what one of them was measured to is no surer than the measurements are
    alike = [make_run(f"x{s}", "kl.target=5", f"run.seed={s}", kl=5.0) for s in range(4)]
    assert pooled(points_of(find_sources(alike)))[0].kl_stderr == pytest.approx(0.1 / 2)


def test_a_sweep_gives_its_finished_points_and_a_run_counts_once(make_run, tmp_path):
    paths = [make_run(f"sweep/p{s}", f"run.seed={s}") for s in range(2)]
    rows = [{"name": "p0"}, {"name": "p1"}, {"name": "p2"}]
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps({"schema": "kltune.sweep/1", "points": rows}))
    found = find_sources([str(tmp_path / "sweep"), paths[0]])
    assert [source.path for source in found] == paths


def test_an_alpha_curve_is_named_by_the_run_it_was_dialled_from(make_run, tmp_path):
    runs = [make_run(str(s), "kl.target=8", f"run.seed={s}") for s in range(2)]
    curves = [curve(tmp_path / f"curve{s}", run, rewards=REWARDS) for s, run in enumerate(runs)]
    curves.append(f"{curve(tmp_path / 'loose', 'some/adapter')}/project.json")
    points = points_of(find_sources(curves))
    assert [(point.curve, point.setting) for point in points[:2]] == [
        ("alpha curve of ppo target, kl.target=8", "alpha=0.5"), ("alpha curve of ppo target, kl.target=8", "alpha=1"),
    ]
    assert {point.curve for point in points[4:]} == {"alpha curve of some/adapter"}
    seeds = pooled(points)
    assert [(setting.setting, setting.seeds, setting.kl) for setting in seeds[:2]] == [
        ("alpha=0.5", 2, 1.0), ("alpha=1", 2, 4.0),
    ]


def test_what_has_not_finished_or_is_nothing_is_refused(make_run, tmp_path):
    with pytest.raises(CheckpointError, match="has not finished"):
        find_sources([make_run("a", status="interrupted")])
    with pytest.raises(CheckpointError, match="is no run, no sweep and no curve"):
        find_sources([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sweep.json").write_text('{"points": [{"name": "a"}]}')
    with pytest.raises(CheckpointError, match="no point of this sweep"):
        find_sources([str(tmp_path / "empty")])
    document = curve(tmp_path / "none", "x", looks=[])
    with pytest.raises(CheckpointError, match="holds no curve"):
        find_sources([document])


def test_references_that_differ_are_named(make_run):
    paths = [make_run("a"), make_run("b", reference=REFERENCE | {"sha256": "e" * 64})]
    with pytest.raises(CheckpointError) as caught:
        check_one_reference(find_sources(paths))
    assert all(path in str(caught.value) for path in paths)
    assert "e" * 12 in str(caught.value)
    check_one_reference(find_sources([paths[0], make_run("c", reference=REFERENCE | {"path": "elsewhere"})]))


def test_rewards_that_differ_are_named_wherever_their_files_are(make_run):
    moved = [REWARDS[0] | {"path": "copy/rewards.py:score"}]
    alike, other = make_run("a", rewards=moved), make_run("b", rewards=[REWARDS[0] | {"sha256": "0" * 64}])
    here = make_run("c")
    check_one_reward(find_sources([here, alike]))
    with pytest.raises(CheckpointError, match="different rewards"):
        check_one_reward(find_sources([here, other]))
    check_one_reward(find_sources([here, make_run("d", rewards=[])]))      # never scored: it disagrees with nothing


def test_another_length_limit_is_noted(make_run):
    notes = differing_measures(find_sources([make_run("a"), make_run("b", "sampling.max_new_tokens=7")]))
    assert len(notes) == 1
    assert "max_new_tokens 7" in notes[0]
    assert differing_measures(find_sources([make_run("c", "run.seed=1"), make_run("d", "kl.target=2")])) == []


# picking


def setting(name: str, kl: float, score: float, *, stderr: float = 0.01, half: float = 0.2) -> Setting:
    return Setting("c", name, 1, kl, 0.1, (kl - half, kl + half), score, stderr, None, None, (None,), (name,))


REFERENCES = {"score": 0.0, "score_stderr": 0.01}


def test_the_best_score_whose_whole_interval_is_within_the_budget():
    settings = [setting("a", 1.0, 0.5), setting("b", 2.0, 0.9), setting("c", 2.9, 1.5), setting("d", 9.0, 3.0)]
    found = pick(settings, 3.0, "score", REFERENCES)
    assert (found["setting"], found["tied"], found["better_than_reference"]) == ("b", [], True)
    assert pick(settings, 3.1, "score", REFERENCES)["setting"] == "c"
    assert pick(settings, 0.5, "score", REFERENCES)["setting"] is None
    assert pick(settings, 3.0, "gold", REFERENCES | {"gold": None})["setting"] is None      # nobody measured it


def test_settings_within_error_of_the_best_are_named():
    settings = [setting("a", 1.0, 0.88, stderr=0.03), setting("b", 2.0, 0.9, stderr=0.03), setting("c", 1.5, 0.7)]
    found = pick(settings, 3.0, "score", REFERENCES)
    assert found["setting"] == "b"
    assert [one["setting"] for one in found["tied"]] == ["a"]


def test_what_is_no_better_than_the_reference_is_not_called_better():
    settings = [setting("a", 1.0, 0.02, stderr=0.02)]
    assert not pick(settings, 3.0, "score", REFERENCES)["better_than_reference"]


# fits and reading off


def test_the_law_is_fitted_where_there_are_runs_enough(make_run):
    nats = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    gain = [math.sqrt(k) * (0.6 - 0.35 * 0.5 * math.log(k)) for k in nats]
    paths = [
        make_run(f"r{k}", f"kl.target={k}", kl=k, score=0.1 + g) for k, g in zip(nats, gain, strict=True)
    ]
    points = points_of(find_sources(paths))
    fit, = fits(points, "score", {"score": 0.1}, None)
    assert (fit["curve"], fit["fit"]["alpha"], fit["fit"]["beta"]) == (
        "ppo target", pytest.approx(0.6), pytest.approx(0.35),
    )
    assert fit["fit"]["observed"]
    few, = fits(points[:3], "score", {"score": 0.1}, None)
    assert (few["fit"], few["claim"]) == (None, "not claimed: 3 points of 3 runs beyond 0.09 nats; wanted 5 of 5")
    assert fits(points, "score", {"score": None}, None)[0]["fit"] is None
    at = curves_at(points, 2.0, "score")["curves"]["ppo target"]
    assert at["score"] == pytest.approx(0.1 + math.sqrt(2) * (0.6 - 0.175 * math.log(2)), abs=0.05)
    assert curves_at(points, 100.0, "score")["curves"]["ppo target"] is None
