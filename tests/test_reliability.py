"""Every promise of the guide on reliability names a test, and the test is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "kltune" / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_promise_names_a_test_that_exists():
    items = re.split(r"\n(?=- |\n|## )", PROMISES)
    promises = [item for item in items if item.startswith("- ")]
    assert len(promises) > 20
    missing = []
    for promise in promises:
        named = re.search(r"(tests/[\w/]+\.py)::(\w+)$", promise.strip())
        if named is None or f"def {named[2]}(" not in (ROOT / named[1]).read_text(encoding="utf-8"):
            missing.append(promise)
    assert missing == []
