"""A KL budget as a test: ``assert_kl`` in a pytest file fails the build where ``kltune eval-kl`` would.

    from kltune.testing import assert_kl

    def test_the_release_is_near_its_base():
        assert_kl("adapters/release", max_kl=8, prompts="held_out.jsonl")
"""

import json
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from kltune.report.text import measured_pairs, verdict_and_kl
from kltune.stages.eval_kl import EvalKLOptions, eval_kl


def assert_kl(
    checkpoint: str | PathLike[str],
    *,
    max_kl: float,
    prompts: str | PathLike[str] | Sequence[str] | None = None,
    reference: str | PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Fail unless KL(policy ‖ reference) of a checkpoint is within a budget, at 95 % confidence.

    It samples until that is decided, up to ``max_responses`` (4,096). A checkpoint at its budget fails as "over" one
    time in forty at most. One that cannot be decided fails too, and the message says how many more responses would
    decide it, or that only more prompts would.

    Args:
        checkpoint: what ``kltune eval-kl`` takes: a run, a checkpoint, an adapter, a model, or a server's address.
        max_kl: the budget; nats per response unless ``unit`` says nats_per_token.
        prompts: a file, or texts; None: those of the run that made the checkpoint.
        reference: likewise; None: the checkpoint's own.
        options: any other of ``EvalKLOptions``, as responses, max_new_tokens, temperature, confidence, seed, against.

    Returns:
        The document of ``kltune eval-kl --json``.

    Raises:
        AssertionError: over budget, or undecided. KltuneError: it could not be measured, which is no pass either.
    """
    texts = prompts if prompts is None or isinstance(prompts, str | PathLike) else list(prompts)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(texts, list):
            rows, texts = texts, Path(folder, "prompts.jsonl")
            texts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows), encoding="utf-8")
        named = {name: None if path is None else str(path) for name, path in
                 (("prompts", texts), ("reference", reference))}
        plain = options.get("transcripts") or any("://" in str(path) for path in (checkpoint, reference))
        asked = {"auto": not plain} | options | named | {"max_kl": max_kl}
        document, code = eval_kl([str(checkpoint)], EvalKLOptions(**asked))
    if code:
        failed = [one for one in measured_pairs(document) if one["gate"]["verdict"] != "pass"]
        raise AssertionError("; ".join(verdict_and_kl(one) for one in failed))
    return document
