"""Held-out scores that other tools wrote, against KL: which run a file is about, and the rank correlation."""

import json
from dataclasses import replace

import numpy as np
import pytest

from kltune.core.kl.intervals import rank_correlation
from kltune.errors import DataError
from kltune.report.frontier.held_out import held_out_document, held_out_lines, held_out_svg, read_scores
from kltune.report.frontier.points import FrontierPoint

KLS = {"a": 1.0, "b": 2.0, "c": 4.0, "d": 7.0, "e": 9.0}


def point(folder, name: str, kl: float) -> FrontierPoint:
    return FrontierPoint(str(folder / name), name, "curve", name, 0, 1.0, kl, 0.1, None, None, None)


@pytest.fixture
def points(tmp_path):
    return [point(tmp_path, name, kl) for name, kl in KLS.items()]


def written(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def harness(folder, name, value, **more):
    return written(folder / f"{name}.json", {
        "results": {"arc": {"alias": "arc", "acc,none": 0.1, "acc_norm,none": value, "acc_norm_stderr,none": 0.02},
                    "story": {"exact_match,strict": value / 2, "exact_match_stderr,strict": 0.01}, **more},
        "config": {"model": "hf", "model_args": f"pretrained=base,peft={folder / name / 'final'},dtype=float32"},
    })


def inspect(folder, name, value):
    return written(folder / f"{name}-log.json", {
        "eval": {"task": "gsm", "model": f"hf/{folder / name}", "model_args": {}},
        "results": {"scores": [
            {"name": "match", "metrics": {"accuracy": {"value": value}, "stderr": {"value": 0.03}}},
        ]},
    })


def test_results_of_the_harness_are_matched_to_runs_by_the_adapter_they_name(tmp_path, points):
    files = [harness(tmp_path, name, 0.9 - 0.05 * number) for number, name in enumerate("abcd")]
    document = held_out_document(points, files)
    assert document["tasks"] == ["arc", "story"]
    assert [row["score"] for row in document["points"]] == pytest.approx([0.75 * (0.9 - 0.05 * n) for n in range(4)])
    assert document["points"][0]["stderr"] == pytest.approx((0.02**2 + 0.01**2) ** 0.5 / 2)
    assert document["rank_correlation"] == -1.0
    assert document["ci95"][1] < 0
    assert document["unscored"] == [str(tmp_path / "e")]
    lines = list(held_out_lines(document))
    assert "rank correlation −1.00 (95 %: −1.00 to " in lines[0]
    assert held_out_svg(document).startswith("<svg")


def test_logs_of_inspect_and_plain_scores_are_read_too(tmp_path, points):
    (one,) = read_scores(inspect(tmp_path, "a", 0.4))
    assert one.tasks == {"gsm/match": (0.4, 0.03)}
    document = held_out_document(points, [inspect(tmp_path, name, 0.5) for name in "abc"])
    assert (document["rank_correlation"], document["ci95"]) == (None, None)
    plain = written(tmp_path / "plain.json", {str(tmp_path / name): kl for name, kl in KLS.items()})
    assert held_out_document(points, [plain])["rank_correlation"] == 1.0


def as_lm_eval_writes(folder, results, **more):
    """A file of lm-evaluation-harness 0.4.13, but for what nobody reads."""
    return written(folder / "results_2026-11-30T10-24-53.142238.json", {
        "results": results, "group_subtasks": {}, "configs": {}, "versions": {}, "n-shot": {}, "n-samples": {},
        "higher_is_better": {}, "git_hash": None, "model_source": "hf", "model_name": str(folder / "a"),
        "config": {"model": "hf", "model_args": {"pretrained": "base", "peft": str(folder / "a"), "dtype": "float32"}},
    } | more)


def scores_of(path) -> dict[str, tuple[float, float | None]]:
    (one,) = read_scores(path)
    return one.tasks


def test_a_file_as_the_harness_writes_it(tmp_path, points, capsys):
    arc = {"name": "arc", "alias": "arc", "sample_len": 40, "acc,none": 0.5, "acc_stderr,none": 0.08}
    assert scores_of(as_lm_eval_writes(tmp_path, {"arc": arc})) == {"arc": (0.5, 0.08)}
    # a group beside its tasks would count them twice
    part = {"acc,none": 0.2, "acc_stderr,none": "N/A"}
    grouped = {"mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.01}, "mmlu_x": part}
    assert scores_of(as_lm_eval_writes(tmp_path, grouped, group_subtasks={"mmlu": ["mmlu_x"], "mmlu_x": []})) == {
        "mmlu_x": (0.2, None)}
    alone = as_lm_eval_writes(tmp_path, grouped, group_subtasks={"mmlu": ["elsewhere"]})
    assert scores_of(alone)["mmlu"] == (0.3, 0.01)
    # two filters are two scores
    filtered = {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.01,
                "exact_match,flexible-extract": 0.3, "exact_match_stderr,flexible-extract": 0.02}
    assert scores_of(as_lm_eval_writes(tmp_path, {"gsm8k": filtered})) == {
        "gsm8k/strict-match": (0.1, 0.01), "gsm8k/flexible-extract": (0.3, 0.02)}
    # other figures count where the file says that high is good; perplexity is left out, and that is said
    odd = {"cola": {"mcc,none": 0.2, "mcc_stderr,none": 0.03}, "wiki": {"word_perplexity,none": 12.0}}
    better = {"cola": {"mcc": True}, "wiki": {"word_perplexity": False}}
    assert scores_of(as_lm_eval_writes(tmp_path, odd, higher_is_better=better)) == {"cola": (0.2, 0.03)}
    assert "wiki has word_perplexity" in capsys.readouterr().err
    with pytest.raises(DataError, match="no score of a task in it; wanted acc_norm"):
        read_scores(as_lm_eval_writes(tmp_path, odd))
    with pytest.raises(DataError, match="acc of arc is nan; wanted a finite number"):
        read_scores(as_lm_eval_writes(tmp_path, {"arc": {"acc,none": float("nan")}}))


def test_a_log_as_inspect_writes_it(tmp_path):
    def logged(scores, **more):
        return written(tmp_path / "2026-11-30T10-26-51-00-00_says_cUVUnC478TfvEQLbb6K664.json", {
            "version": 2, "status": "success", "plan": {}, "samples": [],
            "results": {"total_samples": 6, "scores": scores},
            "eval": {"task": "says", "model": "hf/x", "model_args": {"model_path": str(tmp_path / "a")}},
        } | more)

    def score(name, value, **more):
        return {"name": name, "scorer": name, "params": {}, **more, "metrics": {
            "accuracy": {"name": "accuracy", "value": value, "params": {}},
            "stderr": {"name": "stderr", "value": 0.2, "params": {}}}}

    assert scores_of(logged([score("includes", 0.5), score("match", 0.0)])) == {
        "says/includes": (0.5, 0.2), "says/match": (0.0, 0.2)}
    twice = [score("match", 0.5, reducer="mean"), score("match", 0.8, reducer="pass_at_2")]
    assert scores_of(logged(twice)) == {"says/match/mean": (0.5, 0.2), "says/match/pass_at_2": (0.8, 0.2)}
    mean = {"name": "grade", "metrics": {"stderr": {"value": 0.1}, "mean": {"value": 3.0}}}
    assert scores_of(logged([mean])) == {"says/grade": (3.0, 0.1)}
    with pytest.raises(DataError, match="whose status is 'error', wanted 'success'"):
        read_scores(logged([], status="error", results=None))
    (tmp_path / "a.eval").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match=r"inspect log convert .*--to json"):
        read_scores(str(tmp_path / "a.eval"))


def test_only_tasks_that_all_have_are_compared(tmp_path, points):
    files = [harness(tmp_path, "a", 0.5, more={"acc,none": 0.1}), harness(tmp_path, "b", 0.6)]
    assert held_out_document(points, files)["tasks"] == ["arc", "story"]
    with pytest.raises(DataError, match="no task is known of all"):
        held_out_document(points, [files[0], inspect(tmp_path, "b", 0.4)])


@pytest.mark.parametrize("content", [
    [], {}, {"a": "b"}, {"results": {}}, {"results": {"arc": 3}, "config": {"model_args": "peft=x"}}, {"results": "x"},
    {"eval": {}, "results": {"scores": 4}}, {"results": {"arc": {"acc,none": 0.1}}, "config": []},
])
def test_a_file_of_another_kind_is_refused_by_its_name(tmp_path, content):
    with pytest.raises(DataError, match=r"other\.json"):
        read_scores(written(tmp_path / "other.json", content))


def test_a_file_about_no_run_is_refused(tmp_path, points):
    with pytest.raises(DataError, match="which is none of the runs"):
        held_out_document(points, [harness(tmp_path, "z", 0.5)])


def test_rank_correlation_by_hand_and_its_interval_holds():
    # ranks 1 2 3 4 5 against 2 1 4 3 5: 1 − 6 · 4 / (5 · 24)
    assert rank_correlation([1, 2, 3, 4, 5], [20, 10, 40, 30, 50])[0] == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [5, 5, 9])[0] == pytest.approx(1.0)
    numbers, held, rho = np.random.default_rng(0), 0, 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)      # Spearman's of two normals
    for _ in range(1000):
        x, noise = numbers.standard_normal((2, 20))
        low, high = rank_correlation(x, rho * x + (1 - rho**2) ** 0.5 * noise)[1]
        held += low <= truth <= high
    assert 0.93 <= held / 1000 <= 0.97


def test_a_landed_run_is_a_run_and_of_a_curve_the_whole_adapter_counts(tmp_path):
    landed = replace(point(tmp_path, "a", 3.0), alpha=0.97)
    curve = [replace(point(tmp_path, "b", kl), alpha=alpha) for alpha, kl in ((0.5, 1.0), (1.0, 4.0), (0.75, 2.0))]
    document = held_out_document([landed, *curve], [harness(tmp_path, name, 0.5) for name in "ab"])
    assert [row["kl"] for row in document["points"]] == [3.0, 4.0]
