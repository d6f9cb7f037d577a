"""Files of others: what is no ordinary file is refused at once, and a wrong shape is named with file and field."""

import os
import re
import signal
import time
from typing import Any

import pytest
from typing_extensions import TypedDict

from kltune.errors import CheckpointError, ModelError
from kltune.lm.data import foreign
from kltune.lm.data.encoding import LONG_TEXT, Encoder
from kltune.lm.data.foreign import memory_limit, read_json, read_ordinary, time_limit
from tests.tiny_policies import word_tokenizer


class Inner(TypedDict, total=False):
    ends: int | list[int] | None


class Outer(TypedDict, total=False):
    inner: Inner
    rows: list[Inner]


@pytest.mark.parametrize(("content", "said"), [
    ("[]", "found [], wanted a valid dictionary"),
    ('{"inner": {"ends": "x"}}', 'inner.ends: found "x", wanted a valid integer or a valid list'),
    ('{"rows": [{}, {"ends": 1.5}]}', "rows.1.ends: found 1.5, wanted a valid integer"),
    ('{"rows": null}', "rows: found null, wanted a valid list"),
    ('{"inner": {"ends": true}}', "inner.ends: found true"),
    ('{"a": NaN}', "is not JSON (NaN"), ('{"a": 1e999}', "is not JSON (1e999"), ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"), ("9" * 5000, "is not JSON (a number of 5000 digits"),
])
def test_a_wrong_shape_is_named_with_file_and_field(tmp_path, content, said):
    path = tmp_path / "some.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=re.escape(said)) as error:
        read_json(path, CheckpointError, Outer)
    assert str(path) in str(error.value)


def test_a_right_one_comes_back_as_it_is(tmp_path):
    path = tmp_path / "some.json"
    path.write_text('{"inner": {"ends": [1, 2], "more": {"a": null}}, "other": 1}')
    document: Any = read_json(path, CheckpointError, Outer)
    assert document == {"inner": {"ends": [1, 2], "more": {"a": None}}, "other": 1}


def test_a_pipe_a_device_and_a_folder_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "device", "a device"), (tmp_path, "a folder")):
        with pytest.raises(OSError, match="wanted an ordinary file") as error:
            read_ordinary(path)
        assert kind in str(error.value)


def test_an_expression_without_end_is_given_up():
    with pytest.raises(ModelError, match="slow"), time_limit(0.2, ModelError("slow")):
        re.match("(a|a)*$", "a" * 40 + "b")


def test_what_is_lost_in_a_destructor_or_caught_by_a_library_is_raised_again(monkeypatch):
    monkeypatch.setattr(foreign, "AGAIN_SECONDS", 0.1)
    before, caught = signal.getsignal(signal.SIGALRM), []

    def deaf() -> None:
        while len(caught) < 3:
            try:
                time.sleep(5.0)
            except ModelError as error:
                caught.append(error)
        time.sleep(5.0)

    with pytest.raises(ModelError, match="slow"), time_limit(0.1, ModelError("slow")):
        deaf()
    assert len(caught) == 3
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_memory_beyond_a_limit_is_refused_and_the_limit_goes_again():
    with pytest.raises(MemoryError), memory_limit(1 << 28):
        "a" * (1 << 40)
    assert len("a" * (1 << 28)) == 1 << 28


def test_of_a_very_long_text_the_part_that_counts_is_read_and_gives_the_same_tokens():
    tokenizer = word_tokenizer()
    text = "w3 w4 w5 " * (LONG_TEXT // 9) + "w6 " * 40_000 + "w7"
    whole, part = Encoder(tokenizer), Encoder(tokenizer, limit=50)
    ids = whole.first_ids(text)
    first, last = part.first_ids(text), part.first_ids(text, from_end=True)
    assert first[:50] == ids[:50]
    assert last[-50:] == ids[-50:]
    assert max(len(first), len(last)) < len(ids)


def test_a_very_long_text_of_few_tokens_is_read_whole():
    text = "x" * (2 * LONG_TEXT) + " w3"       # one unknown word
    assert Encoder(word_tokenizer(), limit=50).first_ids(text) == Encoder(word_tokenizer()).first_ids(text)
