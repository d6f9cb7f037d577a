"""What kltune did not make stays as it is: links, locks and folders of others in and around a run's folder."""

import json
import shutil

import pytest

from kltune.errors import CheckpointError, RecipeError
from kltune.run.checkpoint import clear_leftovers, resolve_checkpoint, save_checkpoint
from kltune.run.files import claim, locked, write_whole
from kltune.run.session import open_run

OTHERS = (".tmp-mine", ".tmp-step-000001-7", ".tmp-removed-step-000002", ".old-mine", ".old-final", "step-000009")


def save(folder, step, keep=1):
    return save_checkpoint(
        folder, step, lambda hidden: (hidden / "adapter_config.json").write_text("{}"), info={"reference": {}},
        tensors={}, state={}, keep=keep,
    )


@pytest.mark.parametrize("kind", ["link", "hard link", "file", "folder"])
def test_a_lock_of_others_is_neither_followed_nor_cut(tmp_path, kind):
    precious, run = tmp_path / "precious.txt", tmp_path / "run"
    precious.write_text("all my words")
    run.mkdir()
    lock = run / ".lock"
    {"link": lambda: lock.symlink_to(precious), "hard link": lambda: lock.hardlink_to(precious),
     "file": lambda: shutil.copy(precious, lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(RecipeError, match=r"kltune did not make .*\.lock"), locked(run):
        pass
    assert precious.read_text() == "all my words"
    assert kind != "file" or lock.read_text() == "all my words"


def test_our_own_lock_is_taken_again(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            assert (tmp_path / ".lock").read_text().startswith("process ")


@pytest.mark.parametrize("length", range(len("process 12 on host\n") + 1))
def test_a_lock_that_a_full_disk_cut_short_is_ours(tmp_path, length):
    (tmp_path / ".lock").write_text("process 12 on host\n"[:length])
    with locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process ")


def test_only_what_a_killed_save_of_ours_left_is_removed(tmp_path):
    others = [place / name for place in (tmp_path, tmp_path / "checkpoints") for name in OTHERS]
    for path in others:
        path.mkdir(parents=True)
        (path / "mine.txt").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kltune.json").write_text("{}")
    (tmp_path / "checkpoints" / ".tmp-step-000003-8").symlink_to(elsewhere)
    ours = tmp_path / "checkpoints" / ".tmp-step-000004-9"
    (ours / "state").mkdir(parents=True)
    half = tmp_path / ".tmp-run.json-12"
    half.write_text("{")
    clear_leftovers(tmp_path)
    save(tmp_path, 10)
    save(tmp_path, 20)
    assert not ours.exists()
    assert not half.exists()
    assert [path for path in others if (path / "mine.txt").read_text() != "mine"] == []
    assert (elsewhere / "kltune.json").exists()
    assert not (tmp_path / "checkpoints" / "step-000010").exists()


def test_linked_checkpoints_are_refused(tmp_path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    (elsewhere / ".tmp-step-000001-1" / "state").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(elsewhere)
    with pytest.raises(RecipeError, match="is a link"):
        save(run, 1)
    assert (elsewhere / ".tmp-step-000001-1").is_dir()
    assert list(elsewhere.iterdir()) == [elsewhere / ".tmp-step-000001-1"]


@pytest.mark.parametrize("name", ["checkpoints", "final", "metrics.jsonl", "samples.jsonl", "run.json", "judge.jsonl"])
def test_a_run_writes_through_no_link_out_of_its_folder(make_recipe, tmp_path, name):
    recipe = make_recipe()
    (tmp_path / "out").mkdir()
    target = tmp_path / "precious"
    (tmp_path / "out" / name).symlink_to(target)
    with pytest.raises(RecipeError, match=f"{name} is a link to"), open_run(recipe, resume=False):
        pass
    assert not target.exists()


def test_a_temporary_file_is_not_written_through_a_link(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 5)
    (tmp_path / ".tmp-a.json-5").symlink_to(tmp_path / "precious")
    write_whole(tmp_path / "a.json", "{}")
    assert (tmp_path / "a.json").read_text() == "{}"
    assert not (tmp_path / "precious").exists()


def test_a_final_that_leads_out_of_its_run_is_not_opened(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"schema": "kltune.run/1", "status": "finished"}))
    (tmp_path / "run" / "final").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is a link out of the run"):
        resolve_checkpoint(tmp_path / "run")


def test_a_folder_with_names_like_ours_is_not_ours(tmp_path):
    (tmp_path / ".tmp-thesis").mkdir()
    with pytest.raises(RecipeError, match="is not empty"):
        claim(tmp_path, "run", ours=False)
