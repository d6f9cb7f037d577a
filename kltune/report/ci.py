"""What continuous integration reads of ``kltune eval-kl``: JUnit XML, GitHub's annotations and its step summary."""

import html
import os
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kltune.recipe.faults import printable, redact, visible
from kltune.report.text import budget_of, headline, measured_pairs, pair_name, verdict_and_kl, verdict_line
from kltune.run.files import storing, write_whole
from kltune.run.screen import interval, with_error

ANNOTATION_LEVELS = {"pass": "notice", "fail": "error", "inconclusive": "warning"}


def write_junit(path: Path, document: dict[str, Any]) -> None:
    """Write one test case per checkpoint: passed, or failed where the gate did not pass."""
    cases = []
    for one in measured_pairs(document):
        case = ET.Element("testcase", classname="kltune.eval-kl", name=visible(pair_name(one)))
        gate, exact, properties = one["gate"], headline(one), ET.SubElement(case, "properties")
        for name in ("nats_per_response", "stderr", "nats_per_token"):
            ET.SubElement(properties, "property", name=name, value=str(exact[name]))
        for name in ("path", "sha256"):
            value = visible(str(one.get("reference", {}).get(name)))
            ET.SubElement(properties, "property", name=f"reference.{name}", value=value)
        for warning in one.get("warnings", ()):
            ET.SubElement(properties, "property", name="warning", value=visible(warning))
        if gate is not None and gate["verdict"] != "pass":
            ET.SubElement(case, "failure", type=gate["verdict"], message=visible(verdict_and_kl(one)))
        cases.append(case)
    _write(path, cases, failures=sum(case.find("failure") is not None for case in cases), errors=0)


def write_junit_error(path: Path, checkpoints: Sequence[str], kind: str, message: str) -> None:
    """Write one test case that says why nothing was measured, so that nobody takes the file for a pass."""
    case = ET.Element("testcase", classname="kltune.eval-kl", name=visible(", ".join(checkpoints)))
    ET.SubElement(case, "error", type=kind, message=visible(redact(message)))
    _write(path, [case], failures=0, errors=1)


def _write(path: Path, cases: list[ET.Element], *, failures: int, errors: int) -> None:
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": str(errors)}
    suite = ET.Element("testsuite", name="kltune eval-kl", **counts)
    suite.extend(cases)
    root = ET.Element("testsuites", **counts)
    root.append(suite)
    ET.indent(root)
    write_whole(path, ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n")


def annotations(document: dict[str, Any]) -> list[str]:
    """GitHub workflow commands, one per checkpoint that was held against a budget."""
    return [
        f"::{ANNOTATION_LEVELS[one['gate']['verdict']]} title=kltune eval-kl::{escaped(verdict_and_kl(one))}"
        for one in measured_pairs(document)
        if one["gate"] is not None
    ]


def write_step_summary(document: dict[str, Any]) -> None:
    """Add a table to the page of a GitHub job, where its file is named by GITHUB_STEP_SUMMARY."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return
    lines = [
        "### kltune eval-kl",
        "",
        "| checkpoint | KL(policy‖reference), nats per response | interval | responses | verdict |",
        "|---|---|---|---|---|",
    ]
    for one in measured_pairs(document):
        exact, gate = headline(one), one["gate"]
        cells = (
            pair_name(one), with_error(exact["nats_per_response"], exact["stderr"]),
            interval(exact["ci"], against=budget_of(gate)), str(one["responses"]),
            "" if gate is None else verdict_line(gate),
        )
        told = (html.escape(printable(redact(cell)), quote=False).replace("|", "\\|") for cell in cells)
        lines.append("| " + " | ".join(told) + " |")
    path = Path(name)
    with storing(path), open(path, "a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n\n")


def escaped(text: str, more: str = "") -> str:
    """Text for a GitHub workflow command; properties need ``:`` and ``,`` escaped ``more``."""
    return visible("".join(f"%{ord(c):02X}" if c in "%\r\n" + more else c for c in redact(text)))
