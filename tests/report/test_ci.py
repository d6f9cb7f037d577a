"""JUnit XML that other parsers read, annotations and a step summary that GitHub reads."""

import xml.etree.ElementTree as ET

import pytest

from kltune.report.ci import annotations, escaped, write_junit, write_junit_error, write_step_summary


def document(verdict: str | None, name: str = "runs/a") -> dict:
    gate = None if verdict is None else {
        "max_kl": 4.0, "unit": "nats_per_response", "confidence": 0.95, "verdict": verdict, "more_responses": 120,
        "wants_prompts": False, "planned_looks": 1, "looks": [{"responses": 100, "confidence": 0.95}],
    }  # fmt: skip
    exact = {"nats_per_response": 3.9, "stderr": 0.1, "ci": [3.7, 4.1], "nats_per_token": 0.08}
    return {"checkpoint": name, "responses": 100, "kl": {"exact": exact}, "gate": gate}


@pytest.mark.parametrize(("verdict", "failures"), [("pass", 0), (None, 0), ("fail", 1), ("inconclusive", 1)])
def test_a_gate_that_did_not_pass_is_a_failure(tmp_path, verdict, failures):
    write_junit(tmp_path / "kl.xml", document(verdict))
    root = ET.parse(tmp_path / "kl.xml").getroot()
    (case,) = root.iter("testcase")
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("1", str(failures), "0")
    assert case.get("name") == "runs/a"
    assert [found.get("type") for found in case.iter("failure")] == [verdict] * failures
    assert {p.get("name"): p.get("value") for p in case.iter("property")}["nats_per_response"] == "3.9"


def test_several_checkpoints_are_several_cases(tmp_path):
    several = {"checkpoints": [document("pass"), document("fail", 'b"<&>\x07')]}
    write_junit(tmp_path / "kl.xml", several)
    root = ET.parse(tmp_path / "kl.xml").getroot()
    assert [case.get("name") for case in root.iter("testcase")] == ["runs/a", 'b"<&>\\x07']
    assert root.get("failures") == "1"


def test_a_measurement_that_could_not_be_made_is_an_error_and_no_pass(tmp_path):
    write_junit_error(tmp_path / "kl.xml", ["runs/a"], "ModelError", "the adapter holds NaN\nin a layer")
    root = ET.parse(tmp_path / "kl.xml").getroot()
    (error,) = root.iter("error")
    assert (root.get("errors"), error.get("type")) == ("1", "ModelError")
    assert "NaN" in error.get("message")


def test_annotations_have_the_level_of_the_verdict_and_one_line_each():
    lines = annotations({"checkpoints": [document(v) for v in ("pass", "fail", "inconclusive", None)]})
    assert [line.split(" ")[0] for line in lines] == ["::notice", "::error", "::warning"]
    assert all("\n" not in line and "3.90 ± 0.10" in line for line in lines)


def test_the_step_summary_is_added_to_and_only_where_it_is_wanted(tmp_path, monkeypatch):
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    write_step_summary(document("pass"))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    write_step_summary(document("fail", "a|b"))
    text = path.read_text()
    assert text.startswith("before\n### kltune eval-kl")
    assert "| a\\|b | 3.90 ± 0.10 | 3.7 to 4.1 | 100 | FAIL: over 4 nats per response at 95% confidence |" in text


def test_text_for_annotations_is_escaped():
    assert escaped("50 %\r\nof a:b,c") == "50 %25%0D%0Aof a:b,c"
    assert escaped("50 %\na:b,c", ":,") == "50 %25%0Aa%3Ab%2Cc"
