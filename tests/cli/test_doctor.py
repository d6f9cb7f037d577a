"""``kltune doctor``: what is here and what is not, with the way on, and the exit code of it."""

import importlib.metadata
import json

import pytest

from kltune.cli import doctor, main


@pytest.fixture
def run(capsys):
    """Run ``kltune doctor``: exit code and what it printed."""

    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            main(["doctor", *arguments])
        return left.value.code, capsys.readouterr().out

    return call


def test_a_machine_that_can_run_kltune_takes_a_step(run, tiny_model):
    code, out = run("--json", "--model", str(tiny_model("llama")))
    document = json.loads(out)
    found = {finding["what"]: finding for finding in document["findings"]}
    assert (code, document["ok"]) == (0, True)
    assert "KL to its reference" in found["a step on a tiny model"]["found"]
    assert found[f"a step on {tiny_model('llama')}"]["state"] == "ok"
    assert "GB at the peak of" in found["memory of ppo"]["found"]
    assert {"python", "hub", "memory", "disk"} <= found.keys()


def test_a_model_that_cannot_be_opened_is_5(run, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "version_findings", lambda: iter(()))
    code, out = run("--model", str(tmp_path / "none"))
    assert code == 5
    assert "there is no such folder here" in out or "is no folder here" in out


def test_a_library_out_of_its_range_is_named_with_the_line_that_mends_it(run, monkeypatch):
    wanted = ["torch<2.16,>=2.11", "peft>=99", "nothing-of-that-name>=1", "wandb>=0.19; extra == 'wandb'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    code, out = run()
    assert code == 5
    assert "pip install 'peft>=99'" in out
    assert "pip install 'nothing-of-that-name>=1'" in out
    assert "a step on" not in out


@pytest.mark.parametrize(("version", "wanted", "fits"), [
    ("2.13.0+cpu", ">=2.11,<2.16", True), ("2.16.0", ">=2.11,<2.16", False), ("2.10.9", ">=2.11", False),
    ("5.17", ">=5.17,<5.24", True), ("1.26", "", True), ("2.0", "!=2.0", False), ("0.5.1", "==0.5.1", True),
])
def test_a_version_lies_in_a_range_or_does_not(version, wanted, fits):
    assert doctor.within(version, wanted) is fits
