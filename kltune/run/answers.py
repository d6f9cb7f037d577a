"""The answers of AI judges on disk: a run that is resumed asks nothing twice."""

import io
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from kltune.run.storage import append_line, read_jsonl, storing, to_json

NAME = "judge.jsonl"


class StoredAnswers(MutableMapping[str, float]):
    """A mapping from the sha256 of a question to its answer, each written down as it comes.

    One line holds one answer. A kill may cut the last line short, which loses that answer and no other.
    """

    def __init__(self, folder: Path):
        """Read what a run's folder holds; nothing is written before there is an answer."""
        self.path = Path(folder) / NAME
        rows = read_jsonl(self.path)
        self._known = {row["question"]: float(row["answer"]) for row in rows if {"question", "answer"} <= row.keys()}
        self._file: io.FileIO | None = None

    def __getitem__(self, question: str) -> float:
        return self._known[question]

    def __setitem__(self, question: str, answer: float) -> None:
        """Keep an answer.

        Raises:
            StorageError: it cannot be written.
        """
        self._known[question] = answer
        append_line(self._open(), self.path, to_json({"question": question, "answer": answer}))

    def __delitem__(self, question: str) -> None:
        raise TypeError("answers are kept")

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> io.FileIO:
        if self._file is None:
            with storing(self.path):
                self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed with the run)
                _end_last_line(self._file)
        return self._file


def _end_last_line(file: io.FileIO) -> None:
    """After a line that a kill cut short, the next one starts on its own."""
    if file.seek(0, os.SEEK_END) == 0:
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        file.write(b"\n")
