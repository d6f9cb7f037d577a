"""Files and datasets as rows: what cannot be read is named with its line, and a path never becomes a look-up."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from kltune.errors import DataError
from kltune.lm.data.rows import read_rows

GOOD = '{"prompt": "a"}\n'


def write(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def faults_of(source: str) -> list[str]:
    return [f"{row.where}: {row.fault}" for row in read_rows(source) if row.fault]


def texts_of(source: str) -> dict[str, str]:
    """The prompt of every row, under the row's place."""
    return {row.where: row.fields["prompt"] for row in read_rows(source)}


def refusal(source: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    assert caught.value.exit_code == 5
    return str(caught.value)


# ---- JSONL ------------------------------------------------------------------------------------------------------

WRONG_JSON = {
    "malformed": (GOOD + '{"prompt": "a"\n' + GOOD, "rows.jsonl:2: not JSON: "),
    "two on a line": ('{"prompt": "a"}{"prompt": "b"}\n', "rows.jsonl:1: not JSON: Extra data at column 16"),
    "not an object": (GOOD + '"a"\n', "rows.jsonl:2: found the text 'a', wanted an object"),
    "a list on a line": (GOOD + '[{"prompt": "a"}]\n', "rows.jsonl:2: found a list, wanted one object a line"),
    "a list and more": ('[{"prompt": "a"}]\n' + GOOD, "rows.jsonl:1: found a list, wanted one object a line"),
    "a list that ends early": ('[\n {"prompt": "a"},\n {"prom', "rows.jsonl:3: not JSON: "),
    "a list without a comma": ('[\n {"prompt": "a"}\n {"prompt": "b"}]', "rows.jsonl:2: not JSON: wanted a comma"),
    "a number in a list": ('[{"prompt": "a"}, 7]', "rows.jsonl:1: found the number 7, wanted an object"),
    "field twice in a list": ('[\n{"prompt": "a",\n"prompt": "b"}]', 'rows.jsonl:2: field "prompt": found twice'),
    "field twice": ('{"prompt": "a", "prompt": "b"}\n', 'rows.jsonl:1: field "prompt": found twice'),
    "after blank lines": ("\n \n" + GOOD + "\nnull\n", "rows.jsonl:5: found null, wanted an object"),
    "latin-1": (GOOD.encode() + '{"prompt": "é"}\n'.encode("latin-1"), "rows.jsonl:2: not UTF-8: found byte 0xe9 at"),
    "utf-16": (GOOD.strip().encode("utf-16-le").join([b"\xff\xfe", b""]), "rows.jsonl:1: not UTF-8: found byte 0xff"),
    "NUL": (b'{"prompt": "a\0"}\n', "rows.jsonl:1: found a NUL byte at byte 14"),
    "endless number": (f'{{"prompt": {"9" * 5000}}}\n', "rows.jsonl:1: not JSON that can be read"),
    "endless brackets": ('{"prompt": ' + "[" * 100_000 + "\n", "rows.jsonl:1: not JSON that can be read"),
}


@pytest.mark.parametrize(("content", "words"), WRONG_JSON.values(), ids=WRONG_JSON.keys())
def test_a_line_that_is_no_object_is_named_and_the_others_are_read(tmp_path, content, words):
    faults = faults_of(write(tmp_path, content))
    assert len(faults) == 1
    assert faults[0].startswith(words)


def test_a_byte_order_mark_line_ends_and_blank_lines_change_nothing(tmp_path):
    content = b'\xef\xbb\xbf{"prompt": "a", "id": 7}\r\n\r\n   \r\n{"prompt": "b\\r\\n\xe2\x80\xa8c", "id": null}'
    assert texts_of(write(tmp_path, content)) == {"rows.jsonl:1": "a", "rows.jsonl:4": "b\r\n\u2028c"}


def test_a_json_file_is_read_one_object_a_line(tmp_path):
    assert len(texts_of(write(tmp_path, GOOD * 3, "rows.json"))) == 3


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_a_json_list_is_read_row_by_row_however_it_is_written(tmp_path, indent):
    path = write(tmp_path, json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=indent), "rows.json")
    step = 0 if indent is None else 3
    assert [(row.where, row.fields["prompt"]) for row in read_rows(path)] == [
        (f"rows.json:{1 + (step > 0)}", "a"), (f"rows.json:{1 + (step > 0) + step}", "b"),
    ]


def test_objects_over_several_lines_are_rows(tmp_path):
    objects = "\n".join(json.dumps({"prompt": text}, indent=2) for text in "ab")
    assert texts_of(write(tmp_path, objects)) == {"rows.jsonl:1": "a", "rows.jsonl:4": "b"}


def test_a_line_of_ten_megabytes_is_a_row(tmp_path):
    path = write(tmp_path, json.dumps({"prompt": "x" * 10_000_000}) + "\n" + GOOD)
    assert [len(text) for text in texts_of(path).values()] == [10_000_000, 1]


# ---- CSV --------------------------------------------------------------------------------------------------------

WRONG_CSV = {
    "too few cells": ('prompt,id\na,1\n"b\nc"\n', "rows.csv:3: found 1 cells, wanted 2 as in the header"),
    "too many cells": ('prompt,id\n"a\n\nb",1\n\nb,c,2\n', "rows.csv:6: found 3 cells, wanted 2 as in the header"),
    "text behind a quote": ('prompt\na\n"b"c\nd\n', "rows.csv:3: not CSV: "),
    "quote never closed": ('prompt\na\n"b\nc\n', "rows.csv:3: not CSV: "),
    "latin-1": ("prompt\na\né\n".encode("latin-1"), 'rows.csv:3: field "prompt": not UTF-8'),
}


@pytest.mark.parametrize(("content", "words"), WRONG_CSV.values(), ids=WRONG_CSV.keys())
def test_a_wrong_csv_row_is_named_with_its_first_line(tmp_path, content, words):
    faults = faults_of(write(tmp_path, content, "rows.csv"))
    assert len(faults) == 1
    assert faults[0].startswith(words)


def test_a_csv_column_found_twice_is_refused(tmp_path):
    assert 'rows.csv:1: column "prompt" is found twice' in refusal(write(tmp_path, "prompt,prompt\na,b\n", "rows.csv"))


def test_csv_rows_of_several_lines_keep_text_and_numbers(tmp_path):
    content = '\ufeffprompt,note\r\n"a\nb, c",x\r\n\r\n"say ""d""",\r\n' + f"{'e' * 200_000},\r\n"
    assert texts_of(write(tmp_path, content, "rows.csv")) == {
        "rows.csv:2": "a\nb, c", "rows.csv:5": 'say "d"', "rows.csv:6": "e" * 200_000,
    }


@pytest.mark.parametrize(("content", "prompts"), [
    ("prompt\nHello, world\nA; b, c\n", ["Hello, world", "A; b, c"]),
    ("prompt\tto, the text\na, b\tc\n", ["a, b"]),
])
def test_a_tsv_is_cut_at_tabs_whatever_else_its_header_and_texts_hold(tmp_path, content, prompts):
    for name, written in (("rows.tsv", content.encode()), ("ROWS.TSV.gz", gzip.compress(content.encode()))):
        assert [*texts_of(write(tmp_path, written, name)).values()] == prompts


# ---- Parquet and gzip -------------------------------------------------------------------------------------------


def test_parquet_rows_are_numbered_from_one(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": [f"text {row}" for row in range(1, 2501)]}), path)
    texts = texts_of(str(path))
    assert len(texts) == 2500
    assert texts["rows.parquet:row 2048"] == "text 2048"


def test_parquet_text_that_is_not_utf_8_is_named_with_its_row(tmp_path):
    path = tmp_path / "rows.parquet"
    broken = pyarrow.array([b"a", b"b", b"\xff", b"c"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"prompt": broken}), path)
    assert faults_of(str(path)) == ["rows.parquet:row 3: holds text that is not UTF-8"]


def test_a_parquet_column_found_twice_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"]), path)
    assert refusal(str(path)) == 'rows.parquet: column "prompt" is found twice.'


def test_dates_that_python_has_none_for_are_no_trouble_of_the_texts_beside_them(tmp_path):
    path = tmp_path / "rows.parquet"
    far, us = 2**62, pyarrow.timestamp("us")
    times = {
        "far": pyarrow.array([far], us), "zone": pyarrow.array([0], pyarrow.timestamp("us", tz="America/Nowhere")),
        "date": pyarrow.array([2**60], pyarrow.date64()), "days": pyarrow.array([2**31 - 1], pyarrow.date32()),
        "long": pyarrow.array([far], pyarrow.duration("s")), "clock": pyarrow.array([1], pyarrow.time64("ns")),
        "day": pyarrow.array([0], pyarrow.date32()), "none": pyarrow.array([None], us),
    }
    parquet.write_table(pyarrow.table({"prompt": ["a"], **times}), path)
    (row,) = read_rows(str(path))
    assert (row.fault, row.fields["prompt"], row.fields["day"], row.fields["none"]) == ("", "a", "1970-01-01", None)
    assert row.fields["zone"].startswith("1970-01-01 00:00:00")


def test_a_row_with_a_value_that_python_has_none_for_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    nested = pyarrow.array([[0], [2**62], [1]], pyarrow.list_(pyarrow.timestamp("us")))
    parquet.write_table(pyarrow.table({"prompt": [*"abc"], "seen": nested}), path)
    (fault,) = faults_of(str(path))
    assert fault.startswith("rows.parquet:row 2: holds a value that Python has none for: ")


def test_a_damaged_parquet_file_is_refused(tmp_path):
    assert "rows.parquet is damaged, or no Parquet file" in refusal(write(tmp_path, b"PAR1 no", "rows.parquet"))


@pytest.mark.parametrize(("name", "content"), [("rows.jsonl.gz", GOOD * 3), ("rows.csv.gz", "prompt\na\nb\nc\n")])
def test_a_gzip_file_is_read(tmp_path, name, content):
    assert len(texts_of(write(tmp_path, gzip.compress(content.encode()), name))) == 3


def test_a_gzip_file_that_is_cut_off_or_none_is_refused_with_the_line(tmp_path):
    whole = gzip.compress(b"".join(b'{"prompt": "a", "n": %d}\n' % (number**5) for number in range(5000)))
    message = refusal(write(tmp_path, whole[: len(whole) // 2], "rows.jsonl.gz"))
    line = int(message.split(":")[1])
    assert 1000 < line < 4000
    assert "cut off or damaged here" in message
    assert "rows.jsonl.gz:1: the gzip" in refusal(write(tmp_path, GOOD, "rows.jsonl.gz"))


# ---- paths and names --------------------------------------------------------------------------------------------


@pytest.fixture
def no_lookup(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("a path was looked up"))


@pytest.mark.usefixtures("no_lookup")
@pytest.mark.parametrize(
    "name",
    ["gone.jsonl", "gone.csv", "gone.parquet", "gone.json", "data/gone.jsonl.gz", "/gone/prompts", "./gone", "a/b/c"],
)
def test_a_path_that_does_not_exist_is_named_and_never_looked_up(name):
    assert refusal(name) == f"{name} does not exist."


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows"])
def test_a_pipe_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert refusal(str(tmp_path / name)) == f"{tmp_path / name} is a pipe or a device, wanted an ordinary file."


@pytest.mark.usefixtures("no_lookup")
def test_a_folder_of_no_or_of_several_sets_and_an_unknown_kind_of_file_are_refused(tmp_path):
    assert "is a folder without files of rows, wanted such a file" in refusal(str(tmp_path))
    assert "is a folder; wanted it, or a file in it, without a split" in refusal(f"{tmp_path}:train")
    for name in ("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl"):
        write(tmp_path, GOOD, name)
    assert "wanted one of them: test-00000-of-00001.jsonl, train-00000-of-00001.jsonl" in refusal(str(tmp_path))
    assert "is no kind of data file" in refusal(write(tmp_path, GOOD, "rows.xlsx"))


@pytest.mark.usefixtures("no_lookup")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied", folder)

    monkeypatch.setattr(os, "listdir", denied)
    assert refusal(str(tmp_path)) == f"{tmp_path} cannot be read: Permission denied."


@pytest.mark.usefixtures("no_lookup")
def test_shards_in_a_folder_are_one_set_of_rows_in_the_order_of_their_names(tmp_path):
    for name, text in (("train-00001-of-00002.jsonl", "b"), ("train-00000-of-00002.jsonl", "a"), ("README.md", "c")):
        write(tmp_path, json.dumps({"prompt": text}) + "\n", name)
    assert texts_of(str(tmp_path)) == {"train-00000-of-00002.jsonl:1": "a", "train-00001-of-00002.jsonl:1": "b"}


@pytest.mark.usefixtures("no_lookup")
def test_a_data_set_that_was_saved_to_disk_is_read_and_one_of_splits_names_them(tmp_path):
    rows = datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "all")
    assert texts_of(str(tmp_path / "all" / "train")) == {"train:row 1": "a", "train:row 2": "b"}
    assert "holds several sets of rows; wanted one of them: test, train" in refusal(str(tmp_path / "all"))
    (tmp_path / "all" / "train" / "state.json").write_text("[]")
    assert "is damaged, or no dataset that was saved to disk" in refusal(str(tmp_path / "all" / "train"))
    next((tmp_path / "all" / "test").glob("*.arrow")).unlink()
    assert "is damaged, or no dataset that was saved to disk" in refusal(str(tmp_path / "all" / "test"))


@pytest.mark.usefixtures("no_lookup")
@pytest.mark.parametrize("name", ["json", "a:b:c:d", "name:", ":train"])
def test_what_cannot_name_a_dataset_is_refused_before_any_lookup(name):
    assert "is no file here, and no dataset's name" in refusal(name)


@pytest.mark.parametrize("name", ["no_such_dataset_anywhere", "nobody/no_such_dataset:train", "nobody/no:such:dataset"])
def test_a_name_that_cannot_be_loaded_is_no_file_and_no_dataset(monkeypatch, name):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach it on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    assert refusal(name) == f"{name} is no file here and no dataset that could be loaded: Couldn't reach it on the Hub"


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:test", ("org/name", None, "test")),
        ("org/name:train[:10]", ("org/name", None, "train[:10]")),
        ("org/name:small:test", ("org/name", "small", "test")),
    ],
)
def test_a_dataset_is_asked_for_by_name_config_and_split(monkeypatch, source, asked):
    def load_dataset(name, config, *, split):
        assert (name, config, split) == asked
        return datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of(source) == {f"{source}:row 1": "a", f"{source}:row 2": "b"}
