"""Whoever draws the curves, and whatever it raises, the run goes on and metrics.jsonl is whole."""

import contextlib
import json
import sys
import types
from pathlib import Path

import pytest

from kltune.cli import main
from kltune.errors import RecipeError
from kltune.recipe import recipe_digest
from kltune.run import loggers
from kltune.run.recorder import Report


class Broken(Exception):
    """What no list of known failures holds."""


class Double:
    """A logger that keeps what it is told, and raises at the calls that ``fails`` names."""

    fails: tuple[str, ...] = ()

    def __init__(self, folder, step):
        self.written, self.closed = [], 0
        made.append(self)
        print("a banner")
        self._raise("start")

    def _raise(self, call):
        if call in self.fails:
            raise Broken(call)

    def write(self, step, numbers):
        self.written.append((step, dict(numbers)))
        self._raise("write")

    def close(self):
        self.closed += 1
        self._raise("close")


made: list[Double] = []


@pytest.fixture
def doubles(monkeypatch):
    """trackio is a double that works; the function makes wandb one that raises at the named calls."""
    made.clear()
    monkeypatch.setattr(loggers, "_is_installed", lambda name: True)

    def of(*fails: str) -> None:
        bad = type("Bad", (Double,), {"fails": fails})
        monkeypatch.setattr(loggers, "LOGGERS", {"wandb": bad, "trackio": Double})

    return of


@pytest.mark.parametrize(
    ("fails", "warning"),
    [
        (("start",), "wandb does not start (Broken: start)"),
        (("write",), "wandb stopped writing (Broken: write)"),
        (("write", "close"), "wandb stopped writing (Broken: write)"),
        (("close",), "wandb does not close (Broken: close)"),
    ],
)
def test_a_logger_that_raises_anything_at_any_call_stops_nothing(doubles, tmp_path, capsys, fails, warning):
    doubles(*fails)
    with Report(tmp_path, "ppo", 3, loggers=("wandb", "trackio")) as report:
        for step in (1, 2, 3):
            report.step(step, {"score/mean": 0.5 * step, "kl/beta": None})
    out, err = capsys.readouterr()
    assert out == ""      # a banner is no result
    assert err.count(warning) == err.count("warning:") == 1
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    bad, good = made
    assert good.written == [(1, {"score/mean": 0.5}), (2, {"score/mean": 1.0}), (3, {"score/mean": 1.5})]
    assert good.closed == 1
    assert len(bad.written) == {"start": 0, "write": 1, "close": 3}[fails[0]]


def test_a_logger_is_closed_even_if_the_run_ends_in_an_error(doubles, tmp_path):
    doubles()
    with contextlib.suppress(KeyError), Report(tmp_path, "ppo", 3, loggers=("trackio",)) as report:
        report.step(1, {"score/mean": 1.0})
        raise KeyError
    assert made[0].closed == 1


def test_auto_is_tensorboard_where_it_is_installed_and_no_more(monkeypatch):
    assert loggers.wanted_loggers(()) == ()
    monkeypatch.setattr(loggers, "_is_installed", lambda name: True)
    assert loggers.wanted_loggers("auto") == ("tensorboard",)
    monkeypatch.setattr(loggers, "_is_installed", lambda name: False)
    assert loggers.wanted_loggers("auto") == ()
    with pytest.raises(RecipeError, match=r"trackio, wandb are not installed; pip install trackio wandb,"):
        loggers.wanted_loggers(("trackio", "wandb"))


def test_curves_for_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with Report(tmp_path, "ppo", 1, loggers=("tensorboard",)) as report:
        report.step(1, {"score/mean": 1.0})
        assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_steps_that_are_done_again_are_drawn_once(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, steps in ((0, (1, 2, 3)), (1, (2, 3))):      # killed after step 3, resumed from the checkpoint of step 1
        with Report(tmp_path, "ppo", 3, start_step=start, loggers=("tensorboard",)) as report:
            for step in steps:
                report.step(step, {"score/mean": float(10 * start + step)})
    drawn = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("score/mean")
    assert [(event.step, event.value) for event in drawn] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_what_trackio_and_wandb_are_told(tmp_path, monkeypatch):
    told = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: told.append((step, numbers)), finish=lambda: told.append("finished")
    )
    trackio = types.SimpleNamespace(
        init=lambda **options: told.append(options) or run, finish=lambda: told.append("finished")
    )
    wandb = types.SimpleNamespace(init=lambda **options: told.append(options) or run, Settings=dict)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(loggers, "_is_installed", lambda name: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    folder = tmp_path / "my-run"
    folder.mkdir()
    with Report(folder, "ppo", 1, loggers=("trackio", "wandb")) as report:
        report.step(1, {"score/mean": 1.0})
    assert [entry["name"] for entry in told[:2]] == ["my-run", "my-run"]
    assert told[1]["mode"] == "offline"      # nothing leaves the machine unless WANDB_MODE says so
    assert told[1]["dir"] == str(folder)
    assert told[2:] == [(1, {"score/mean": 1.0})] * 2 + ["finished"] * 2


def test_a_name_that_is_not_installed_or_not_known_is_2_before_anything_is_written(make_recipe, monkeypatch, capsys):
    output = Path(make_recipe().run.output)
    recipe = output.parent / "recipe" / "ppo.yaml"
    monkeypatch.setattr(loggers, "_is_installed", lambda name: False)
    for name, words in (("wandb", "pip install wandb, or leave it out"), ("wandd", "did you mean wandb?")):
        with pytest.raises(SystemExit) as caught:
            main(["ppo", "--recipe", str(recipe), "--set", f"run.loggers=[{name}]", "--output", str(output)])
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
    assert not output.exists()


def test_who_draws_the_curves_is_no_part_of_what_a_run_is(make_recipe):
    nobody, somebody = make_recipe("run.loggers=[]"), make_recipe("run.loggers=[tensorboard]")
    assert nobody != somebody
    assert recipe_digest(nobody) == recipe_digest(somebody)
