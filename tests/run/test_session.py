"""Who may write in a folder, where a run starts, how it is stopped, and what run.json says of it."""

import contextlib
import errno
import json
import os
import resource
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from killing import adapter_of, exit_code, start

from kltune.errors import BusyError, CheckpointError, Interrupted, RecipeError
from kltune.lm.model.fingerprint import Fingerprint
from kltune.lm.rewards.inputs import inputs_of
from kltune.recipe import load_recipe
from kltune.recipe.faults import redact
from kltune.run.checkpoint import save_checkpoint, save_final
from kltune.run.files import write_json
from kltune.run.recorder import Report
from kltune.run.session import Run, finished_result, open_run
from kltune.run.subprocesses import STOP_SIGNALS

REFERENCE = Fingerprint("some/model", None, "float32", "ab", "ef", "01", config={"model_type": "llama"})


def record_of(recipe) -> dict:
    return json.loads((Path(recipe.run.output) / "run.json").read_text())


def lines_of(recipe, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (Path(recipe.run.output) / name).read_text().splitlines()]


def save(run: Run, step: int) -> None:
    save_checkpoint(run.folder, step, adapter_of(step), info={}, tensors={"o": {"x": torch.zeros(1)}}, state={}, keep=3)


def interrupted_at(recipe, saved: int, reported: int) -> None:
    """Leave an unfinished run with a checkpoint and some later steps."""
    with contextlib.suppress(Interrupted), open_run(recipe, resume=False) as run:
        assert run.model == recipe.model
        run.set_reference(REFERENCE)
        with Report(run.folder, "ppo", recipe.run.steps) as report:
            for step in range(1, reported + 1):
                report.step(step, {"score/mean": step / 10})
                report.samples(step, [{"prompt": "once", "response": f"upon {step}"}])
                if step == saved:
                    save(run, step)
        raise Interrupted("stopped", signal.SIGTERM)


def finish(recipe, **result: object) -> None:
    with open_run(recipe, resume=False) as run:
        run.finish({"schema": "kltune.result/1", **result})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_leaves_its_recipe_and_record(make_recipe, monkeypatch):
    monkeypatch.setattr("sys.argv", ["kltune", "ppo", "--recipe", "a b.yaml"])
    recipe = make_recipe("run.seed=7")
    with open_run(recipe, resume=False) as run:
        assert record_of(recipe)["status"] == "running"
        assert (run.start_step, run.resume_from, run.stop_signal) == (0, None, None)
        run.set_reference(REFERENCE)
        run.finish({"steps": 10})
    assert load_recipe(run.folder / "recipe.yaml") == recipe
    record = record_of(recipe)
    assert record["schema"] == "kltune.run/1"
    assert (record["stage"], record["status"], record["seed"], record["error"]) == ("ppo", "finished", 7, None)
    assert record["reference"] == REFERENCE.as_dict()
    assert record["command"] == "kltune ppo --recipe 'a b.yaml'"
    assert {"python", "torch", "transformers", "peft", "kltune"} <= set(record["versions"])
    assert record["started"] <= record["ended"]


def test_random_numbers_depend_on_seed_stream_and_step_only(make_recipe):
    with open_run(make_recipe(), resume=False) as run:
        first = run.rng("sampling", 3).random(4).tolist()
        run.rng("minibatches", 3).random(100)
        assert run.rng("sampling", 3).random(4).tolist() == first
        assert run.rng("sampling", 4).random(4).tolist() != first
        assert run.rng("minibatches", 3).random(4).tolist() != first
        run.finish({})


def test_a_folder_that_is_no_run_is_left_alone(make_recipe, tmp_path):
    recipe = make_recipe()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(RecipeError, match=r"thesis\.tex"), open_run(recipe, resume=True):
        pass
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_an_output_that_is_a_file_is_refused(make_recipe, tmp_path):
    (tmp_path / "out").write_text("")
    for recipe in (make_recipe(output="out"), make_recipe(output="out/inside")):
        with pytest.raises(RecipeError, match="a file has that name"), open_run(recipe, resume=False):
            pass


def test_resume_in_an_empty_folder_starts(make_recipe):
    with open_run(make_recipe(), resume=True) as run:
        assert run.start_step == 0
        run.finish({})


def test_an_unfinished_run_asks_for_resume(make_recipe):
    recipe = make_recipe()
    interrupted_at(recipe, saved=4, reported=6)
    assert record_of(recipe)["status"] == "interrupted"
    with pytest.raises(RecipeError, match=r"holds an unfinished run \(step 4\): add --resume"), \
            open_run(recipe, resume=False):
        pass
    assert len(lines_of(recipe)) == 6


def test_a_run_that_failed_before_its_first_step_may_start_again(make_recipe):
    with pytest.raises(ZeroDivisionError), open_run(make_recipe(), resume=False):
        raise ZeroDivisionError("no\nsecond line")
    assert record_of(make_recipe())["status"] == "failed"
    assert record_of(make_recipe())["error"] == "ZeroDivisionError: no"
    with open_run(make_recipe("kl.target=3"), resume=False) as run:
        assert run.start_step == 0
        run.finish({})


def test_resume_cuts_what_will_be_done_again(make_recipe):
    recipe = make_recipe()
    interrupted_at(recipe, saved=4, reported=6)
    started = record_of(recipe)["started"]
    folder = Path(recipe.run.output)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "score/me')      # a kill in the middle of a line
    whole = (folder / "metrics.jsonl").read_text().splitlines()
    with open_run(recipe, resume=True) as run:
        assert (run.start_step, run.resume_from) == (4, folder / "checkpoints/step-000004")
        assert (folder / "metrics.jsonl").read_text().splitlines() == whole[:4]
        assert [row["step"] for row in lines_of(recipe, "samples.jsonl")] == [1, 2, 3, 4]
        assert record_of(recipe)["status"] == "running"
        run.finish({})
    assert record_of(recipe)["resumed_at"] == [4]
    assert record_of(recipe)["started"] == started


def test_resume_computes_in_the_dtype_that_auto_came_to_as_the_run_began(make_recipe):
    recipe = make_recipe()
    interrupted_at(recipe, saved=4, reported=4)
    with open_run(recipe, resume=True) as run:
        assert (recipe.model.dtype, run.model.dtype) == ("auto", REFERENCE.dtype)
        run.finish({})


def test_resume_with_nothing_saved_starts_from_the_beginning(make_recipe):
    recipe = make_recipe()
    interrupted_at(recipe, saved=0, reported=3)
    with open_run(recipe, resume=True) as run:
        assert run.start_step == 0
        assert lines_of(recipe) == []
        run.finish({})


def lose_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def truncate_all(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(b"")


def truncate_record(folder: Path) -> None:
    (folder / "run.json").write_bytes(b"")


def lose_all_but_the_record(folder: Path) -> None:
    write_json(folder / "run.json", json.loads((folder / "run.json").read_text()) | {"saved_step": 20})
    shutil.rmtree(folder / "checkpoints")
    (folder / "metrics.jsonl").unlink()


@pytest.mark.parametrize("loss", [lose_checkpoints, truncate_all, truncate_record, lose_all_but_the_record])
def test_resume_that_finds_less_than_there_was_refuses_and_touches_nothing(make_recipe, loss):
    recipe = make_recipe("run.save_every=4")
    interrupted_at(recipe, saved=4, reported=6)
    folder = Path(recipe.run.output)
    loss(folder)
    before = files_of(folder)
    with pytest.raises(CheckpointError, match="Nothing was touched") as caught, open_run(recipe, resume=True):
        pass
    assert caught.value.exit_code == 5
    assert files_of(folder) == before


def test_resume_waits_for_a_checkpoint_that_cannot_be_read_for_a_moment(make_recipe, monkeypatch):
    recipe = make_recipe()
    interrupted_at(recipe, saved=4, reported=6)
    before = files_of(Path(recipe.run.output))

    listed = os.listdir

    def unreadable(path: Path) -> list[str]:
        if Path(path).name == "checkpoints" or Path(path).is_file():
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listed(path)

    with monkeypatch.context() as patch:
        patch.setattr("kltune.run.checkpoint._sha256", unreadable)
        with pytest.raises(CheckpointError, match="Input/output error"), open_run(recipe, resume=True):
            pass
        patch.setattr(os, "listdir", unreadable)
        with pytest.raises(CheckpointError, match=r"checkpoints cannot be read"), open_run(recipe, resume=True):
            pass
    assert files_of(Path(recipe.run.output)) == before
    with open_run(recipe, resume=True) as run:
        assert run.start_step == 4
        run.finish({})


@pytest.mark.parametrize("damage", [lambda final: shutil.rmtree(final), lambda final: truncate_all(final)])
def test_a_finished_run_whose_final_is_damaged_is_not_finished(make_recipe, damage):
    recipe = make_recipe()
    with open_run(recipe, resume=False) as run, Report(run.folder, "ppo", 10) as report:
        report.step(1, {})
        report.samples(1, [{"response": "while it trained"}, {"response": "at the end", "final": True}])
        save(run, 1)
        result = run.finish({"final": str(save_final(run.folder, adapter_of(1), info={}))})
    assert finished_result(recipe) == result
    damage(run.folder / "final")
    assert finished_result(recipe) is None
    with pytest.raises(CheckpointError, match=r"final.*Add --resume to make final again"), \
            open_run(recipe, resume=False):
        pass
    with open_run(recipe, resume=True) as run:
        assert run.start_step == 1
        assert [row["response"] for row in lines_of(recipe, "samples.jsonl")] == ["while it trained"]
        run.finish({})


def test_resume_with_another_recipe_names_the_keys(make_recipe):
    interrupted_at(make_recipe("kl.target=6", "run.keep=3"), saved=4, reported=4)
    with pytest.raises(RecipeError, match=r"(?s)kl\.target: was 6\.0, now 3\.0.*run\.seed: was 0, now 1"), \
            open_run(make_recipe("kl.target=3", "run.seed=1"), resume=True):
        pass
    with open_run(make_recipe("kl.target=6", "run.keep=1"), resume=True) as run:
        assert run.start_step == 4
        run.finish({})


def test_a_project_that_was_moved_goes_on_and_other_files_do_not(make_recipe, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once"}\n')
    recipe = make_recipe(f"data.prompts={tmp_path}/prompts.jsonl")
    with contextlib.suppress(Interrupted), open_run(recipe, resume=False) as run:
        run.set_inputs(inputs_of(recipe))
        run.set_reference(REFERENCE)
        with Report(run.folder, "ppo", recipe.run.steps) as report:
            report.step(1, {"score/mean": 0.1})
        save(run, 1)
        raise Interrupted("stopped", signal.SIGTERM)
    for name, text in {"same": '{"prompt": "Once"}\n', "other": '{"prompt": "Twice"}\n'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.jsonl").write_text(text)
    with pytest.raises(RecipeError, match=r"data\.prompts: was "), \
            open_run(make_recipe(f"data.prompts={tmp_path}/other/prompts.jsonl"), resume=True):
        pass
    with open_run(make_recipe(f"data.prompts={tmp_path}/same/prompts.jsonl"), resume=True) as run:
        assert run.start_step == 1
        run.finish({})


def test_a_finished_run_that_was_moved_speaks_of_itself(make_recipe, tmp_path):
    there = make_recipe().run.output
    finish(make_recipe(), output=there, final=f"{there}/final")
    save_final(Path(there), lambda folder: (folder / "weights").write_bytes(b""), info={})
    shutil.move(there, tmp_path / "moved")
    run = make_recipe().run.model_copy(update={"output": str(tmp_path / "moved")})
    result = finished_result(make_recipe().model_copy(update={"run": run}))
    assert (result["output"], result["final"]) == (str(tmp_path / "moved"), str(tmp_path / "moved" / "final"))


def test_the_seconds_of_earlier_sessions_count(make_recipe):
    interrupted_at(make_recipe(), saved=4, reported=4)
    write_json(Path(make_recipe().run.output) / "run.json", record_of(make_recipe()) | {"seconds": 1000.0})
    with open_run(make_recipe(), resume=True) as run:
        assert 1000.0 < run.seconds() < 1100.0
        run.finish({})


@pytest.mark.parametrize(("name", "line"), [
    ("metrics.jsonl", '{"step": null}'), ("samples.jsonl", '{"step": "x"}'),
    ("judge.jsonl", '{"question": "q", "answer": null}'),
])
def test_an_odd_line_of_its_own_files_is_named(make_recipe, name, line):
    interrupted_at(make_recipe(), saved=4, reported=4)
    with open(Path(make_recipe().run.output) / name, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=rf"{name}: .*wanted a valid"), open_run(make_recipe(), resume=True):
        pass


def test_resume_against_another_reference_is_refused(make_recipe):
    interrupted_at(make_recipe(), saved=4, reported=4)
    with pytest.raises(CheckpointError, match=r"weights: found cd \(some/model\), wanted ab"), \
            open_run(make_recipe(), resume=True) as run:
        run.set_reference(replace(REFERENCE, sha256="cd"))


def test_resume_asks_for_the_settings_and_ends_of_the_reference_and_not_for_a_template_no_row_needs(make_recipe):
    interrupted_at(make_recipe(), saved=4, reported=4)
    for changed in ({"config": {"model_type": "gpt2"}}, {"ends": {"ids": [3]}}):
        record = REFERENCE.as_dict() | changed
        write_json(Path(make_recipe().run.output) / "run.json", record_of(make_recipe()) | {"reference": record})
        with pytest.raises(CheckpointError, match=next(iter(changed)).replace("ends", "end of a response")), \
                open_run(make_recipe(), resume=True) as run:
            run.set_reference(REFERENCE)
    record = REFERENCE.as_dict() | {"template_sha256": "other"}
    write_json(Path(make_recipe().run.output) / "run.json", record_of(make_recipe()) | {"reference": record})
    with open_run(make_recipe(), resume=True) as run:
        run.set_reference(REFERENCE)
        run.finish({})


def test_a_finished_run_gives_its_result_and_changes_nothing(make_recipe, tmp_path):
    assert finished_result(make_recipe()) is None
    finish(make_recipe(), score=0.1 + 0.2)
    before = files_of(tmp_path / "out")
    assert finished_result(make_recipe("run.keep=9")) == {"schema": "kltune.result/1", "score": 0.1 + 0.2}
    with pytest.raises(RecipeError, match=r"kl\.target: was 6\.0, now 2\.0"):
        finished_result(make_recipe("kl.target=2"))
    with pytest.raises(RecipeError, match="finished run"), open_run(make_recipe(), resume=True):
        pass
    assert files_of(tmp_path / "out") == before | {str(tmp_path / "out/.lock"): (tmp_path / "out/.lock").read_bytes()}


def test_a_result_that_is_not_finite_becomes_null(make_recipe):
    with open_run(make_recipe(), resume=False) as run:
        result = run.finish({"kl": {"nats_per_response": float("nan"), "ci95": [0.0, float("inf")]}})
    assert result == {
        "kl": {"nats_per_response": None, "ci95": [0.0, None]}, "nonfinite": ["kl.nats_per_response", "kl.ci95[1]"]}
    assert finished_result(make_recipe()) == result


def test_a_second_process_is_told_who_has_the_folder(make_recipe):
    def second() -> None:
        with pytest.raises(BusyError, match=f"process {os.getppid()} on {os.uname().nodename}") as caught, \
                open_run(make_recipe(), resume=True):
            pass
        raise caught.value

    with open_run(make_recipe(), resume=False) as run:
        assert exit_code(start(second)) == 75
        run.finish({})


def test_a_killed_process_frees_the_folder(make_recipe, tmp_path):
    def hang() -> None:
        with open_run(make_recipe(), resume=False):
            (tmp_path / "ready").touch()
            time.sleep(60)

    pid = start(hang)
    wait_for(tmp_path / "ready")
    os.kill(pid, signal.SIGKILL)
    assert exit_code(pid) == -signal.SIGKILL
    finish(make_recipe())


def wait_for(path: Path) -> None:
    give_up = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < give_up, f"{path} never came"
        time.sleep(0.005)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_the_first_signal_lets_the_step_finish(make_recipe, tmp_path, capfd, number):
    def train() -> None:
        with open_run(make_recipe(), resume=False) as run:
            (tmp_path / "ready").touch()
            while run.stop_signal is None:
                time.sleep(0.01)
            save(run, 1)
            raise Interrupted("stopped after step 1", run.stop_signal)

    pid = start(train)
    wait_for(tmp_path / "ready")
    os.kill(pid, number)
    assert exit_code(pid) == 128 + number
    assert f"{number.name}: finishing this step" in capfd.readouterr().err
    assert record_of(make_recipe())["status"] == "interrupted"
    with open_run(make_recipe(), resume=True) as run:
        assert run.start_step == 1
        run.finish({})


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_the_second_signal_ends_the_process_at_once(make_recipe, tmp_path, second):
    def deaf() -> None:
        with open_run(make_recipe(), resume=False) as run:
            (tmp_path / "ready").touch()
            while run.stop_signal is None:
                time.sleep(0.005)
            (tmp_path / "told").touch()
            time.sleep(60)

    pid = start(deaf)
    wait_for(tmp_path / "ready")
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGTERM)      # as `timeout` does: one request, sent twice
    wait_for(tmp_path / "told")
    time.sleep(0.15)
    os.kill(pid, second)
    began = time.monotonic()
    assert exit_code(pid) == -second
    assert time.monotonic() - began < 1


def test_handlers_are_put_back_and_other_threads_install_none(make_recipe):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    inside = []

    def elsewhere() -> None:
        with open_run(make_recipe(), resume=False) as run:
            inside.append(signal.getsignal(signal.SIGTERM))
            run.finish({})

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert inside == [before[0]]
    with open_run(make_recipe(output="other"), resume=False) as run:
        assert signal.getsignal(signal.SIGTERM) == run._on_signal
        run.finish({})
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_full_disk_keeps_the_record_that_was_there(make_recipe):
    recipe = make_recipe()

    def fill() -> None:
        with open_run(recipe, resume=False) as run:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            run.finish({"much": "x" * 1000})

    assert exit_code(start(fill)) == 74
    assert record_of(recipe)["status"] == "running"      # the last word that could be written, and whole


def test_secrets_stay_out_of_the_folder(make_recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    secrets = ["correct-horse-battery", "hf_abcdefghijklmnopqrstuv", "hunter2hunter2", "user:pw1234"]
    monkeypatch.setattr("sys.argv", ["kltune", "ppo", "--set", f"reward.0.api_key={secrets[2]}", secrets[1]])
    with pytest.raises(ValueError, match="battery"), open_run(make_recipe(), resume=False) as run:
        raise ValueError(f"{secrets[0]} {secrets[1]} http://{secrets[3]}@judge/v1")
    written = b"".join(files_of(run.folder).values()).decode()
    assert "[redacted]" in written
    command = "kltune ppo --set kl.unit=nats_per_token --set kl.target=0.2 --unit nats_per_token runs/a"
    assert redact(f"{command} --api-key {secrets[2]}", arguments=True) == f"{command} --api-key [redacted]"
    assert [secret for secret in secrets if secret in written] == []


def test_a_run_that_goes_on_keeps_the_threads_that_it_began_with(make_recipe, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = iter([3])
    monkeypatch.setattr("kltune.lm.machine.threads.free_threads", lambda most: (next(free), "three are free"))
    recipe, before = make_recipe(), torch.get_num_threads()
    with contextlib.suppress(Interrupted), open_run(recipe, resume=False) as run, run.with_threads():
        assert torch.get_num_threads() == record_of(recipe)["threads"] == 3
        save(run, 1)
        raise Interrupted("stopped", signal.SIGTERM)
    assert torch.get_num_threads() == before
    assert "threads: 3 (three are free)" in capsys.readouterr().err
    with open_run(recipe, resume=True) as run, run.with_threads():
        assert torch.get_num_threads() == record_of(recipe)["threads"] == 3
    assert "threads: 3 (as the run began)" in capsys.readouterr().err
    recipe = make_recipe("run.threads=2")      # no other recipe: the run goes on with as many as are asked for
    with open_run(recipe, resume=True) as run, run.with_threads():
        assert torch.get_num_threads() == record_of(recipe)["threads"] == 2
    assert "began with 3, so numbers may differ" in capsys.readouterr().err
