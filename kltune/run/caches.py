"""Answers of AI judges and the reference's log-probabilities on disk: a resumed run asks and measures nothing twice."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kltune.lm.data.documents import Answered
from kltune.lm.rewards.judge import Answers
from kltune.run.files import append_line, read_jsonl, storing, to_json, write_whole

JUDGE_FILE = "judge.jsonl"
REF_LOGPROBS_FILE = "reference_logprobs.safetensors"


class StoredAnswers(Answers):
    """Answers that are written down as they come, one on a line; a kill may cut the last one short, and no other."""

    def __init__(self, folder: Path, stopped: Callable[[], bool] = lambda: False):
        """Read what a run's folder holds; nothing is written before there is an answer. stopped: see ``Answers``."""
        self.path = Path(folder) / JUDGE_FILE
        rows = (row for row in read_jsonl(self.path, Answered) if {"question", "answer"} <= row.keys())
        super().__init__({row["question"]: float(row["answer"]) for row in rows}, stopped)
        self._cut_short = self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")

    def record(self, question: str, answer: float) -> None:
        """Keep an answer; StorageError if it cannot be written."""
        super().record(question, answer)
        line = to_json({"question": question, "answer": answer})
        with storing(self.path), open(self.path, "ab", buffering=0) as file:
            append_line(file, self.path, f"\n{line}" if self._cut_short else line)
        self._cut_short = False


class StoredLogprobs:
    """The reference's log-probabilities by what was measured, in words; written down whole at each addition.

    A file that is damaged counts as none. What it holds of other pairs or another reference stays in it, unused.
    """

    def __init__(self, folder: Path):
        """Nothing is read before it is asked for, and nothing written before there is something to keep."""
        self.path = Path(folder) / REF_LOGPROBS_FILE
        self._held: dict[str, Tensor] | None = None
        self._read_before = 0

    def get(self, measured: str) -> Tensor | None:
        """What was measured; None where it was not."""
        return self._known().get(measured)

    def record(self, measured: str, logprobs: Tensor) -> None:
        """Keep what was measured; StorageError if it cannot be written, and what was kept before is intact."""
        known = self._known()
        if self._read_before:
            print(
                f"note: {self.path} is of other pairs, steps or weights; the reference was measured again.",
                file=sys.stderr,
            )
        known[measured] = logprobs.clone()      # a file of tensors has none that share memory
        write_whole(self.path, save(known, metadata={name: _sha256(tensor) for name, tensor in known.items()}))

    def _known(self) -> dict[str, Tensor]:
        if self._held is None:
            self._held = self._read() if self.path.exists() else {}
            self._read_before = len(self._held)
        return self._held

    def _read(self) -> dict[str, Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                sums = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        except (SafetensorError, OSError) as error:
            return self._damaged(str(error))
        wrong = [name for name, tensor in held.items() if sums.get(name) != _sha256(tensor)]
        return self._damaged("not what was saved: its sha256 differs") if wrong else held

    def _damaged(self, reason: str) -> dict[str, Tensor]:
        print(f"warning: {self.path} is damaged ({reason}); the reference is measured again.", file=sys.stderr)
        return {}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
