"""What bench_peers.py makes of numbers, by hand; the peer itself is never run in the tests."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
from bench_peers import SCRIPTS, WORKS, check_part, figures, sized, summary
from peers_gates import CLOSE, TRACE_CLOSE, compared_traces, gap, gate_row, gradient_gap, same_numbers
from peers_watch import Watch
from safetensors.numpy import load_file


def test_a_gap_is_absolute_below_1_and_a_share_above():
    assert gap(0.5, 0.5 + 1e-6) == pytest.approx(1e-6)
    assert gap([0.1, -400.0], [0.1, -401.0]) == pytest.approx(1.0 / 401.0)


@pytest.mark.parametrize("theirs", [[1.0], [1.0, math.nan], [1.0, math.inf]], ids=["shape", "nan", "infinite"])
def test_what_cannot_be_compared_is_infinitely_far(theirs):
    assert gap([1.0, 2.0], theirs) == math.inf
    assert gate_row("losses", gap([1.0, 2.0], theirs), CLOSE)["passed"] is False


def test_gradients_are_held_against_each_other_as_one_vector():
    theirs = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([4.0], np.float32)}
    ours = {"a": np.array([3.0, 0.3], np.float32), "b": np.array([4.4], np.float32)}
    assert gradient_gap(ours, theirs) == pytest.approx(0.5 / 5.0)
    assert gradient_gap({"a": ours["a"]}, theirs) == math.inf
    assert gradient_gap(theirs, {name: 0.0 * tensor for name, tensor in theirs.items()}) == math.inf


def test_one_step_that_differs_fails_the_trace():
    assert compared_traces("dpo", [0.7, 0.6], [0.7, 0.6 + 0.9 * TRACE_CLOSE])["passed"]
    assert not compared_traces("dpo", [0.7, 0.6], [0.7 + 1.1 * TRACE_CLOSE, 0.6])["passed"]
    assert not compared_traces("dpo", [0.7, 0.6], [0.7])["passed"]


def test_a_watch_leaves_out_two_steps_and_the_last(tmp_path, monkeypatch):
    ends = iter([0.0, 10.0, 19.0, 21.0, 24.0, 30.0])     # steps of 10, 9, 2, 3, 6 seconds
    monkeypatch.setattr("peers_watch.time.perf_counter", lambda: next(ends))
    watch = Watch()
    for _ in range(6):
        watch.stamp()
    watch.write(tmp_path / "run.json")
    assert '"seconds": [2.0, 3.0]' in (tmp_path / "run.json").read_text()


def test_what_is_done_once_is_shared_among_the_steps():
    run = {
        "seconds": [1.0, 2.0, 9.0], "cpu_seconds": [1.0, 1.0, 1.0], "inside": {"generate": [0.0, 0.0, 0.0]},
        "before_seconds": {"once": 4.0, "once_cpu": 2.0}, "peak_mb": 500.0, "held_mb": 400.0, "floor_seconds": 1.0,
        "values": {"tokens": 96.0}, "peak_mb_inside": {"generate": 450.0, "update": 500.0},
    }
    run["inside"] |= {"update": [1.0, 1.5, 1.5], "update_cpu": [1.0, 1.5, 1.5]}
    assert figures(run, steps=8) == {
        "seconds": 2.5, "cpu_seconds": 1.25, "peak_mb": 500.0, "peak_mb_above_model": 100.0, "floor_seconds": 1.0,
        "update_seconds": 1.5, "update_mb_above_model": 100.0, "tokens": 96.0,
    }


def test_ratios_are_of_medians_and_of_what_both_tools_tell():
    ours = [{"seconds": s, "once": 1.0} for s in (1.0, 2.0, 6.0)]
    theirs = [{"seconds": s} for s in (6.0, 4.0, 50.0)]
    mine, other = summary("dpo", "matched", 16, {"kltune": ours, "trl": theirs})
    assert mine["per_second"] == 8.0
    assert mine["range"] == [1.0, 6.0]
    assert other["over_kltune"] == {"seconds": 3.0}
    assert "over_kltune" not in mine


def test_a_share_of_the_floor_is_of_each_tool_s_own_seconds():
    runs = {"kltune": [{"seconds": 2.0, "floor_seconds": 1.0}], "trl": [{"seconds": 4.0}]}
    assert [row["share_of_floor"] for row in summary("ppo", "matched", 16, runs)] == [0.5, 0.25]
    assert summary("trpo", "matched", 16, {"kltune": [{"seconds": 2.0}]})[0]["per_second"] == 8.0      # without a peer


def test_parts_of_another_kl_are_not_timed():
    check_part("score-wide", "float32", [{"kl": 3.0}, {"kl": 3.001}])
    check_part("eval-kl-wide", "float32", [{"sampled_kl": 3.0}, {"sampled_kl": 4.0}])
    with pytest.raises(SystemExit, match=r"DIFFERENT\nno timings of score-wide"):
        check_part("score-wide", "float32", [{"kl": 3.0}, {"kl": 3.02}])


def test_phases_add_up_to_the_step_and_each_has_its_peak(tmp_path, monkeypatch):
    ends, peaks = iter([0.0, 1.0, 4.0, 9.0, 10.0, 13.0, 20.0, 30.0, 40.0]), iter([5.0, 9.0, 30.0, 7.0, *[1.0] * 9])
    monkeypatch.setattr("peers_watch.time.perf_counter", lambda: next(ends))
    monkeypatch.setattr("peers_watch.memory_mb", lambda _: next(peaks))
    watch = Watch()
    watch.stamp()
    watch.timed("generate", lambda: None)()
    watch.stamp()
    watch.timed("generate", lambda: None)()
    for _ in range(3):
        watch.stamp()
    watch.write(tmp_path / "run.json")
    document = json.loads((tmp_path / "run.json").read_text())
    assert document["seconds"] == document["inside"]["rest"] == [10.0]      # the third; two to warm up, and the last
    assert document["before_seconds"] == {"generate": 0.0, "generate_cpu": 0.0, "rest": 0.0, "rest_cpu": 0.0}
    assert document["peak_mb_inside"] == {"generate": 30.0, "rest": 9.0}
    assert document["peak_mb"] == 30.0


SMALL = {"prompt_tokens": 8, "new_tokens": 4, "random": {"hidden": 64, "layers": 1, "vocabulary": 64, "logits": 2.0}}
ASKED = Namespace(stories="", smol="", pairs="", prompts="", batch=None, group=None, works=[])


def made(folder, work: dict, steps: tuple[str, str] = ("prepare", "run")) -> dict:
    """What kltune's own side says of a work, in processes of its own."""
    (folder / "work.json").write_text(json.dumps(work | {"model": str(folder / "model")}))
    for step in steps:
        command = [sys.executable, SCRIPTS / "peers_kltune.py", step, folder, folder / "out.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "out.json").read_text())


@pytest.mark.parametrize("name", ["dpo-v32000", "grpo"])
def test_kltunes_own_side_runs_and_stamps_its_steps(tmp_path, name):
    document = made(tmp_path, sized(name, ASKED, 4) | SMALL | {"rows": 16})
    assert len(document["seconds"]) == 4 - 3  # two to warm up, and the last, are left out
    assert document["peak_mb"] > document["held_mb"] > 0.0
    assert document["floor_seconds"] > 0.0
    assert len(document["losses"]) == (4 if name.startswith("dpo") else 0)  # PPO has no loss to hold against TRL's


def test_kltunes_own_side_of_the_gates_runs(tmp_path):
    work = sized("dpo-v32000", ASKED, 1) | SMALL | {"rows": 4, "losses": True}
    losses = made(tmp_path, work, ("prepare-gate", "gate"))["losses"]
    assert len(losses) == 13
    assert all(math.isfinite(value) for value in losses.values())
    tensors = load_file(tmp_path / "out.safetensors")
    assert gap(tensors["logprobs"], tensors["logprobs"]) == 0.0
    assert gap(tensors["logprobs"], tensors["ref_logprobs"]) > 0.0
    assert same_numbers(tmp_path / "out.json", tmp_path / "out.json", "bfloat16")[0]["passed"]


@pytest.mark.stress
@pytest.mark.parametrize("name", [name for name in WORKS if name.endswith("-wide")])
def test_every_row_runs_on_kltunes_own_side(tmp_path, name):
    pairs = tmp_path / "pairs.jsonl"
    texts = [f"\n\nHuman: {'who ' * count}\n\nAssistant: it is {'him ' * count}" for count in range(1, 6)]
    pairs.write_text("\n".join(json.dumps({"chosen": text, "rejected": f"{text}not"}) for text in texts))
    asked = Namespace(**vars(ASKED) | {"pairs": pairs})
    document = made(tmp_path, sized(name, asked, 4, "bfloat16") | SMALL | {"rows": 400})
    assert document["seconds"][0] > 0.0
    assert document["floor_seconds"] > 0.0
    if WORKS[name]["part"] not in (None, "sample", "ragged"):
        assert min(document["values"].values()) > 0.0
