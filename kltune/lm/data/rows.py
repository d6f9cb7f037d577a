"""Rows of a data file, each with the place it was read from.

JSONL and CSV have readers of their own here because a fault in the data must be named as ``file:line``, which the
readers of ``datasets`` and pandas cannot do: they stop at the first bad line, or skip it, without its number.
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kltune.errors import DataError

SUFFIXES = (
    ".jsonl", ".json", ".jsonl.gz", ".json.gz", ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".txt", ".txt.gz", ".parquet",
)
SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}      # the first where none is
WHOLE = "one JSON document, which is held in memory as a whole (of a list, `jq -c '.[]'` makes one row a line)"
BESIDE_ROWS = ("dataset_dict.json", "dataset_infos.json", "dataset_info.json")      # what datasets writes of them
SHARD = re.compile(r"([A-Za-z]*)")        # of a file's name: what stands before the number of the shard is the split
LINES = "one prompt or text a line"
FOLDERS = {"base", "checkpoint", "checkpoints", "data", "final", "model", "models", "output", "outputs", "runs"}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# load_dataset reads these names as "all files below the working folder", which nobody means by `prompts: json`.
BUILDER_NAMES = frozenset({"arrow", "csv", "json", "pandas", "parquet", "text", "xml", "webdataset"})


class RowFault(Exception):
    """One row cannot be used; the message says what was found and what was wanted, not where."""


@dataclass(frozen=True)
class Row:
    """One row of a source: its fields, or the reason why it has none. note: what there is to say of the file's kind."""

    where: str                  # "prompts.jsonl:12", "prompts.parquet:row 12", "org/name:train:row 12"
    fields: dict[str, Any]
    fault: str = ""             # not empty: the row could not be read, and fields is empty
    note: str = ""


def read_rows(source: str) -> Iterator[Row]:
    """Read the rows of a JSONL, CSV or Parquet file, or of a dataset that ``datasets`` can load.

    A path never touches the network: only a source that is no file here, and does not look like one, is a name.
    A row that cannot be read comes back with its fault, so that the caller can list all of them.

    The source is the path of a ``.jsonl``, ``.json`` (one object a line, or a JSON list of them), ``.csv`` (the
    separator is found in the header), ``.tsv``, ``.txt`` (a line is the prompt, or the text, of a row; each also
    ``.gz``) or ``.parquet`` file, a folder of such files or of one split that ``save_to_disk`` wrote, or ``name``,
    ``name:split`` or ``name:config:split`` of a dataset (split ``train`` by default). Blank lines are not rows.

    Raises:
        DataError: no such file or dataset, a pipe or a device, a kind of file that is not read here, or a damaged file.
    """
    path = os.path.expanduser(source)
    kind = path.lower().removesuffix(".gz")
    if os.path.isdir(path):
        yield from _folder_rows(path)
    elif os.path.isdir(path.partition(":")[0]):
        raise DataError(f"{source}: {path.partition(':')[0]} is a folder; wanted it, or a file in it, without a split.")
    elif not os.path.exists(path):
        if looks_like_a_path(path):
            raise DataError(f"{source} does not exist.")
        yield from _dataset_rows(source)
    elif not os.path.isfile(path):      # it is read more than once, which a pipe does not survive
        raise DataError(f"{source} is a pipe or a device, wanted an ordinary file.")
    elif not path.lower().endswith(SUFFIXES):
        raise DataError(f"{source} is no kind of data file that can be read here: {', '.join(SUFFIXES)}.")
    elif kind.endswith((".csv", ".tsv")):
        yield from _csv_rows(path)
    elif kind.endswith(".txt"):
        yield from _text_rows(path)
    elif kind.endswith(".parquet"):
        yield from _parquet_rows(path)
    else:
        yield from _json_rows(path)


def looks_like_a_path(path: str) -> bool:
    """Whether a source that is no file here was meant as one, and not as the name of a dataset."""
    # One slash alone says little: `org/name` is how the hub names a dataset.
    signs = path.lower().endswith(SUFFIXES) or path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    return signs or ("/" in path and is_place(path.partition(":")[0]))


def is_place(path: str, home: str | os.PathLike[str] = "") -> bool:
    """Whether what is no folder here was meant as one: hub names are of two words, the first of which is an owner.

    home: where relative paths start.
    """
    first = path.partition("/")[0]
    beside = first != path and os.path.isdir(os.path.join(home, first))
    return os.path.isabs(path) or not HUB_NAME.fullmatch(path) or beside or first in FOLDERS


def _folder_rows(folder: str) -> Iterator[Row]:
    """Rows of the files of a folder in the order of their names, or of what ``save_to_disk`` of ``datasets`` wrote."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if "state.json" in names:
        yield from _saved_rows(folder)
        return
    files = [name for name in names if name.lower().endswith(SUFFIXES) and name not in BESIDE_ROWS]
    splits = {SHARD.match(name)[1] for name in files}
    if "dataset_dict.json" in names or len(splits) > 1:
        inside = ", ".join(name for name in names if name in files or os.path.isdir(os.path.join(folder, name)))
        raise DataError(f"{folder} holds several sets of rows; wanted one of them: {inside}.")
    if not files:
        raise DataError(f"{folder} is a folder without files of rows, wanted such a file: {', '.join(SUFFIXES)}.")
    for name in files:
        yield from read_rows(os.path.join(folder, name))


def _saved_rows(folder: str) -> Iterator[Row]:
    import datasets  # takes seconds to load

    try:
        loaded = datasets.load_from_disk(folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged, or no dataset that was saved to disk: {error}") from error
    yield from (Row(f"{os.path.basename(folder)}:row {number}", row) for number, row in enumerate(loaded, start=1))


def _lines(path: str) -> Iterator[tuple[str, bytes]]:
    """``file:line`` and the bytes of each line, without a byte order mark; the line end is kept."""
    name, number = os.path.basename(path), 0
    try:
        with gzip.open(path) if path.lower().endswith(".gz") else open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield f"{name}:{number}", line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name}:{number + 1}: the gzip file is cut off or damaged here ({error}).") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json_rows(path: str) -> Iterator[Row]:
    document = _json_document(path)
    if document is not None:
        yield from document
        return
    for where, line in _lines(path):
        if line.strip():
            yield _json_row(where, line)


def _json_row(where: str, text: bytes, note: str = "") -> Row:
    try:
        return Row(where, _parse_object(text), note=note)
    except RowFault as fault:
        return Row(where, {}, str(fault), note)


def _text_rows(path: str) -> Iterator[Row]:
    for where, line in _lines(path):
        if line.strip():
            try:
                text = line.decode("utf-8").rstrip("\r\n")
                yield Row(where, {"prompt": text, "text": text}, note=LINES)
            except UnicodeDecodeError as error:
                yield Row(where, {}, _not_utf8(line, error), LINES)


def _not_utf8(line: bytes, error: UnicodeDecodeError) -> str:
    return f"not UTF-8: found byte 0x{line[error.start]:02x} at byte {error.start + 1}"


def _json_document(path: str) -> list[Row] | None:
    """The rows of a file that is one JSON list, or of objects over several lines, each with the line it begins on.

    None where the first line is a row, or the file is no such document: then each line is a row, or at fault.
    """
    first = next((line for _, line in _lines(path) if line.strip()), b"").lstrip()
    if not first.startswith((b"[", b"{")) or (first.startswith(b"{") and _is_json(first)):
        return None
    try:
        text = b"".join(line for _, line in _lines(path)).decode("utf-8")
    except UnicodeDecodeError:
        return None
    name, decoder, rows, line, before = os.path.basename(path), json.JSONDecoder(), [], 1, 0
    at = _skip(text, 0)
    listed = text[at] == "["
    at = _skip(text, at + listed)
    while at < len(text) and not (listed and text[at] == "]"):
        line, before = line + text.count("\n", before, at), at
        try:
            _, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return [*rows, Row(f"{name}:{line}", {}, f"not JSON: {error}", WHOLE)] if listed or rows else None
        rows.append(_json_row(f"{name}:{line}", text[at:end].encode("utf-8"), WHOLE))
        at = _skip(text, end)
        if not listed and at < len(text) and "\n" not in text[end:at]:
            return None
        if listed and text[at : at + 1] == ",":
            at = _skip(text, at + 1)
        elif listed and text[at : at + 1] != "]":
            fault = "not JSON: wanted a comma, or the list's end, behind it"
            return [*rows, Row(f"{name}:{line}", {}, fault, WHOLE)]
    return rows if not listed or not text[at + 1 :].strip() else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _skip(text: str, at: int) -> int:
    """The next place at which something else than white space stands."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _parse_object(line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8")
        if "\0" in text:
            raise RowFault(f"found a NUL byte at byte {line.index(0) + 1}, wanted text")
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except UnicodeDecodeError as error:
        raise RowFault(_not_utf8(line, error)) from error
    except json.JSONDecodeError as error:
        raise RowFault(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:       # a number of thousands of digits; thousands of open brackets
        raise RowFault(f"not JSON that can be read: {error}") from error
    if isinstance(value, list):
        raise RowFault("found a list, wanted one object a line (`jq -c '.[]' FILE` makes that of a JSON list)")
    if not isinstance(value, dict):
        raise RowFault(f"found {describe(value)}, wanted an object")
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):        # json would keep the last one and say nothing
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowFault(f'field "{repeated}": found twice in one object')
    return fields


def _csv_rows(path: str) -> Iterator[Row]:
    """Rows below a header line; a row of several lines has the number of its first one."""
    # Bytes that are not UTF-8 go through as lone surrogates: an error here would end the csv reader.
    lines = (line.decode("utf-8", errors="surrogateescape") for _, line in _lines(path))
    name, header = os.path.basename(path), None
    separator = _separator(path)
    note = "" if separator == "," else f"columns are separated by {SEPARATORS[separator]}"
    limit = csv.field_size_limit(2**31 - 1)     # the default refuses a cell of more than 128 KiB
    try:
        reader = csv.reader(lines, strict=True, delimiter=separator)
        while True:
            where = f"{name}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Row(where, {}, f"not CSV: {error}")
                continue
            if cells is None:
                return
            if header is None and cells:
                header = cells
                if repeated := [name for name in cells if cells.count(name) > 1]:
                    raise DataError(f'{where}: column "{repeated[0]}" is found twice in the header.')
            elif cells:                         # a blank line has none
                yield _csv_row(where, header, cells, note)
    finally:
        csv.field_size_limit(limit)


def _separator(path: str) -> str:
    """What stands between the names of the header: a comma, or what cuts a header without one into the most names.

    A file that says it is separated by tabs is.
    """
    if path.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    header = next((line for _, line in _lines(path) if line.strip()), b"").decode("utf-8", errors="replace")
    cells = {}
    for separator in SEPARATORS:
        try:
            cells[separator] = len(next(csv.reader([header], delimiter=separator), []))
        except csv.Error:       # said when the rows are read
            cells[separator] = 0
    return "," if cells[","] > 1 else max(cells, key=cells.get)


def _csv_row(where: str, header: list[str], cells: list[str], note: str) -> Row:
    if len(cells) != len(header):
        return Row(where, {}, f"found {len(cells)} cells, wanted {len(header)} as in the header", note)
    broken = next((name for name, cell in zip(header, cells, strict=True) if has_surrogate(cell)), None)
    if broken is not None:
        return Row(where, {}, f'field "{broken}": not UTF-8', note)
    return Row(where, dict(zip(header, cells, strict=True)), note=note)


def _parquet_rows(path: str) -> Iterator[Row]:
    import pyarrow  # slow to load, and needed for this kind of file only
    from pyarrow import parquet

    name, number = os.path.basename(path), 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if repeated := [column for column in names if names.count(column) > 1]:
                raise DataError(f'{name}: column "{repeated[0]}" is found twice.')
            for batch in file.iter_batches(batch_size=1024):
                for fields in _batch_rows(_with_written_times(batch)):
                    number += 1
                    where = f"{name}:row {number}"
                    yield Row(where, {}, fields) if isinstance(fields, str) else Row(where, fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is damaged, or no Parquet file, after row {number}: {error}") from error


def _with_written_times(batch: Any) -> Any:
    """An Arrow batch with its dates and times as text: many have none in Python, or need the time zones of a system."""
    import pyarrow

    for at, field in enumerate(batch.schema):
        column, kind = batch.column(at), field.type
        if pyarrow.types.is_timestamp(kind) and kind.tz is not None:
            column = column.cast(pyarrow.timestamp(kind.unit))      # in UTC
        if pyarrow.types.is_temporal(kind):
            batch = batch.set_column(at, field.name, column.cast(pyarrow.string()))
    return batch


def _batch_rows(batch: Any) -> list[dict[str, Any] | str]:
    """The rows of an Arrow batch; what is wrong with a row that cannot be read, which spoils its whole batch."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        fault = "holds text that is not UTF-8"
    except (ValueError, OverflowError) as error:
        fault = f"holds a value that Python has none for: {error}"
    if batch.num_rows == 1:
        return [fault]
    return [row for at in range(batch.num_rows) for row in _batch_rows(batch.slice(at, 1))]


def _dataset_rows(source: str) -> Iterator[Row]:
    name, config, split = _dataset_name(source)
    import datasets  # takes seconds to load, and a path does not need it

    try:
        loaded = datasets.load_dataset(name, config, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{source} is no file here and no dataset that could be loaded: {reason}") from error
    for number, fields in enumerate(loaded, start=1):
        yield Row(f"{source}:row {number}", fields)


def _dataset_name(source: str) -> tuple[str, str | None, str]:
    """``name[:config][:split]`` taken apart; a split may be a slice, ``train[:10]``, with a colon of its own."""
    parts = re.split(r":(?![^\[]*\])", source)
    if len(parts) > 3 or not all(parts) or parts[0] in BUILDER_NAMES:
        raise DataError(f"{source!r} is no file here, and no dataset's name: name, name:split or name:config:split.")
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    return parts[0], None, parts[1] if len(parts) == 2 else "train"


def has_surrogate(text: str) -> bool:
    """Whether the text holds half of a surrogate pair, which no tokenizer and no UTF-8 file can take."""
    return re.search("[\ud800-\udfff]", text) is not None


def describe(value: Any) -> str:
    """What was found, in the words of an error message."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return "empty text" if not value else f"the text {value[:40]!r}" if value.strip() else "only white space"
    if isinstance(value, int | float):
        digits = str(value)
        return f"the number {digits}" if len(digits) <= 40 else f"the number {digits[:20]}… of {len(digits)} digits"
    return {list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")
