"""Folders that are odd, damaged or made to harm: no code of theirs runs, nothing hangs, every one ends in one line."""

import logging
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kltune.cli import main
from kltune.errors import KltuneError
from kltune.lm.model.opening import load_reference
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import ModelReward, ModelSection
from kltune.report import pages
from tests.hostile import Change, Hung, single_fields, slow, traps, watchdog, whole_files

SECONDS = 10.0
CPU = torch.device("cpu")
EXPECTED = {0, 2, 3, 4, 5, 6}
READ = (".json", ".jsonl", ".yaml")


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """Nothing is kept of what libraries log: of odd files it has characters that no report can be sent on with."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def sound(tmp_path_factory, llama, run_folder, reward_model) -> dict[str, Path]:
    """Folders as they should be, by what they are; without manifests, which would find every change."""
    home = tmp_path_factory.mktemp("sound")
    shutil.copytree(llama, home / "model")
    shutil.copytree(run_folder / "final", home / "checkpoint")
    shutil.copytree(home / "checkpoint", home / "adapter")
    shutil.copytree(reward_model, home / "reward")
    for kind in ("checkpoint", "adapter", "reward"):
        (home / kind / "manifest.json").unlink()
    (home / "adapter" / "kltune.json").unlink()
    (home / "run").mkdir()
    for path in (path for path in run_folder.iterdir() if path.suffix in READ):
        shutil.copy(path, home / "run")
    (home / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    return {path.name: path for path in home.iterdir()}


def commands(kind: str, folder: Path, sound: dict[str, Path]) -> Iterator[Callable[[], object]]:
    """What opens a folder of a kind."""
    few = ("--prompts", sound["prompts.jsonl"], "--responses", 2, "--max-new-tokens", 2)
    if kind == "model":
        yield lambda: load_reference(ModelSection(path=str(folder)), device=CPU)
        yield lambda: run("eval-kl", sound["adapter"], "--reference", folder, *few)
    elif kind == "reward":
        yield lambda: load_scorer([ModelReward(kind="model", path=str(folder))], folder, CPU)
    elif kind == "run":
        yield lambda: run("report", folder)
        yield lambda: run("frontier", folder, "--best-of", 0)
    else:
        yield lambda: load_reference(ModelSection(path=str(sound["model"]), sft_adapter=str(folder)), device=CPU)
        yield lambda: run("eval-kl", folder, *few)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pages without pictures, which take longer than all the reading."""
    monkeypatch.setattr(pages, "draw", lambda *_: None)


def run(*arguments: object) -> None:
    main([*map(str, arguments)])


def fault(command: Callable[[], object]) -> str | None:
    """What is wrong with how a command ended; None if it ended as it should."""
    try:
        with watchdog(SECONDS):
            command()
    except KltuneError as error:
        return None if str(error) else "says nothing"
    except SystemExit as end:
        return None if end.code in EXPECTED else f"exit code {end.code}"
    except Hung as error:
        return f"hangs: {error}"
    except BaseException:  # noqa: BLE001  it is what a user would see as a traceback
        return traceback.format_exc(limit=-2)
    return None


def odd(kind: str, folder: Path) -> list[Change]:
    """Every odd file there can be in a folder of a kind, in an order that a fixed seed gives."""
    changes = []
    for file in sorted(path for path in folder.iterdir() if path.suffix in READ):
        changes += whole_files(file.name)
        if file.suffix == ".json":
            changes += single_fields(folder, file.name)
    random.Random(kind).shuffle(changes)
    return changes


def faults(kind: str, changes: list[Change], sound: dict[str, Path], home: Path, sprung: Path) -> list[str]:
    """What went wrong, in ASCII, which every reporter can print; after every change nothing must have run."""
    found = []
    for change in changes:
        folder = home / kind
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound[kind], folder)
        change.make(folder)
        for command in commands(kind, folder, sound):
            if wrong := fault(command):
                found.append(ascii(f"{kind}: {change.name}: {wrong}"))
        if sprung.exists():
            found.append(f"{kind}: {change.name}: its code ran")
            sprung.rmdir()
    return found


KINDS = ("model", "adapter", "checkpoint", "run", "reward")


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_file_ends_in_one_line(kind, sound, tmp_path):
    assert faults(kind, odd(kind, sound[kind])[:6], sound, tmp_path, tmp_path / "sprung") == []


@pytest.mark.stress
@pytest.mark.parametrize("kind", KINDS)
def test_400_odd_files_end_in_one_line_each(kind, sound, tmp_path):
    assert faults(kind, odd(kind, sound[kind])[:80], sound, tmp_path, tmp_path / "sprung") == []


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["model", "adapter", "reward"])
def test_no_code_of_a_folder_runs_and_nothing_outside_of_it_is_opened(kind, sound, tmp_path):
    sprung = tmp_path / "sprung"
    assert faults(kind, list(traps(sprung)), sound, tmp_path, sprung) == []


def test_what_leads_to_code_or_out_of_a_folder_is_refused_by_training_too(sound, tmp_path):
    let_through = []
    for change in traps(tmp_path / "sprung"):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound["model"], folder)
        change.make(folder)
        if " beside" in change.name or change.name.startswith("adapter_model"):
            continue
        try:
            load_reference(ModelSection(path=str(folder)), device=CPU)
        except KltuneError:
            continue
        let_through.append(change.name)
    assert let_through == []


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_a_template_an_expression_and_a_size_without_end_are_met(kind, sound, tmp_path):
    changes = list(slow(sound[kind]))
    assert faults(kind, [changes[0], changes[-1]], sound, tmp_path, tmp_path / "sprung") == []


@pytest.mark.stress
@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_nothing_of_a_folder_takes_for_ever(kind, sound, tmp_path):
    assert faults(kind, list(slow(sound[kind])), sound, tmp_path, tmp_path / "sprung") == []
