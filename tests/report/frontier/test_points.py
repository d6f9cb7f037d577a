"""Runs as points: which curve a recipe is on, and references, rewards and measures that differ."""

import json
from pathlib import Path

import pytest

from kltune.errors import CheckpointError
from kltune.report.frontier.points import (
    check_one_reference,
    check_one_reward,
    differing_measures,
    family,
    find_sources,
    points_of,
    setting_key,
)
from kltune.report.frontier.pooling import pooled
from tests.report.frontier.conftest import REFERENCE, REWARDS


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
    path = make_run("a", "kl.target=2", kl=1.9, target=2.0, steps=(0.2, 1.6, 1.7, 2.2))
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
        make_run("d", "kl.control=fixed", "kl.beta=0.2", target=None),
        make_run("e", "kl.control=fixed", "kl.beta=0.1", "eval.responses=7", target=None),
    ]
    points = points_of(find_sources(paths))
    assert [(point.curve, point.setting) for point in points] == [
        ("ppo target, ppo.epochs=4", "kl.target=2"), ("ppo target, ppo.epochs=4", "kl.target=4"),
        ("ppo target, ppo.epochs=2", "kl.target=4"), ("ppo fixed", "kl.beta=0.2"), ("ppo fixed", "kl.beta=0.1"),
    ]
    assert points[3].steps_to_target is None


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
    (tmp_path / "empty" / "sweep.json").write_text('{"schema": "kltune.sweep/1", "points": [{"name": "a"}]}')
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


def test_settings_and_ends_of_the_reference_count_where_both_runs_recorded_them(make_run):
    recorded = REFERENCE | {"config": {"rms_norm_eps": 1e-6, "hidden_size": 8}, "ends": {"ids": [1]}}
    paths = [make_run("new", reference=recorded), make_run("old")]
    check_one_reference(find_sources(paths))
    for place, changed in enumerate(({"config": {"rms_norm_eps": 1e-3}}, {"ends": {"ids": [1, 2]}})):
        other = make_run(f"other-{place}", reference=recorded | changed)
        with pytest.raises(CheckpointError, match=r"not alike in (rms_norm_eps|ids)"):
            check_one_reference(find_sources([paths[0], other]))


def test_rewards_that_differ_are_named_wherever_their_files_are(make_run):
    moved = [REWARDS[0] | {"path": "copy/rewards.py:score"}]
    alike, other = make_run("a", rewards=moved), make_run("b", rewards=[REWARDS[0] | {"sha256": "0" * 64}])
    here = make_run("c")
    check_one_reward(find_sources([here, alike]))
    with pytest.raises(CheckpointError, match="different rewards"):
        check_one_reward(find_sources([here, other]))
    with pytest.raises(CheckpointError, match="different rewards"):      # another function of the same file
        check_one_reward(find_sources([here, make_run("e", rewards=[REWARDS[0] | {"path": "rewards.py:gold"}])]))
    check_one_reward(find_sources([here, make_run("d", rewards=[])]))      # never scored: it disagrees with nothing


def test_another_length_limit_is_noted(make_run):
    notes = differing_measures(find_sources([make_run("a"), make_run("b", "sampling.max_new_tokens=7")]))
    assert len(notes) == 1
    assert "max_new_tokens 7" in notes[0]
    assert differing_measures(find_sources([make_run("c", "run.seed=1"), make_run("d", "kl.target=2")])) == []
