"""What strangers wrote is shown, and steers nothing: terminals, logs that GitHub reads for commands, XML, JSON."""

import io
import json
import re
import xml.etree.ElementTree as ET

import pytest

from kltune.cli.output import complain, emit, emit_json
from kltune.errors import ModelError
from kltune.recipe.faults import printable, redact, visible
from kltune.report.ci import escaped, write_junit_error
from kltune.run.screen import ShownText

PAYLOADS = [
    *(chr(code) for code in (*range(9), *range(0x0B, 0x20), 0x7F, *range(0x80, 0xA0))),     # 0x0A and tabs are text
    "\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://x\x1b\\link", "\x9b31m", "a\rkltune: PASS", "\u202egnp", "\u2066x",
    "\u200e", "\u061c", "\u2028::error::x", "\ud800", "\udcff", "\ufffe", "\uffff",
    "::error::x", "a\n::error::x", "a\n  ::stop-commands::x", "a\r\n::add-mask::x", "##[error]x", "a ##[add-mask]x",
    "]]><x/>", "<!--", "&#0;",
]
CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
HARMFUL = re.compile(CONTROLS + "|(?m:^\\s*::)|##\\[")


def test_there_are_enough_of_them():
    assert len(PAYLOADS) >= 60


@pytest.mark.parametrize("payload", PAYLOADS, ids=ascii)
def test_nothing_gets_through(payload, capsys, tmp_path, monkeypatch):
    text = f"a folder {payload}\nand {payload} more"
    stream = io.StringIO()
    print(text, payload, file=ShownText(stream))
    emit(text)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    complain(ModelError(text))
    out, err = capsys.readouterr()
    message, annotation = err.split("::error title=kltune::")
    for shown in (stream.getvalue(), out, message, annotation, visible(text)):
        assert HARMFUL.search(shown) is None
    assert "\n" not in annotation.rstrip("\n")
    assert "\n" not in printable(text)
    assert HARMFUL.search(escaped(text)) is None
    write_junit_error(tmp_path / "junit.xml", [payload], "ModelError", text)
    case = ET.parse(tmp_path / "junit.xml").getroot().find(".//testcase")
    assert case.get("name") == visible(payload)
    emit_json({"text": text})
    written = capsys.readouterr().out
    assert written.isascii()
    assert HARMFUL.search(written) is None
    assert json.loads(written) == {"text": text}


SECRETS = {
    "HF_TOKEN": "hf_abcdefghijklmnopqrstuv", "OPENAI_API_KEY": "sk-abcdefghijklmnop1234",
    "JUDGE_API_KEY": "plain-and-long", "AWS_SECRET_ACCESS_KEY": "/abcd/efgh+ijkl",
    "DB_PASSWORD": "with 'quotes' and \\ more", "GH_PAT": "odd\u00e9-letters",
    "SOME_PASSPHRASE": "three words here", "HTTP_AUTH": "dXNlcjpwYXNz",
}
SHAPES = ["hf_zyxwvutsrqponmlkjihg", "sk-ant-abcdefghij-klmnopq", "ghp_abcdefghijklmnopqrst", "user:word12@host"]


@pytest.mark.parametrize("secret", [*SECRETS.values(), *SHAPES])
def test_no_secret_is_shown_or_written_in_any_of_its_forms(secret, monkeypatch, capsys):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    found = secret.split("@")[0]
    text = f"https://{secret}/x" if "@" in secret else f"it was {secret}."
    stream = io.StringIO()
    print(text, file=ShownText(stream))
    emit(text)
    emit_json({"text": text})
    complain(ModelError(text))
    out, err = capsys.readouterr()
    for shown in (stream.getvalue(), out, err, redact(repr(text)), redact(json.dumps(text))):
        assert found not in shown
        assert json.dumps(found)[1:-1] not in shown
        assert "[redacted]" in shown
