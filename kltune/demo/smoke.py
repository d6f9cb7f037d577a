"""One whole run of one step, to see that a machine can do it."""

import contextlib
import io
import json
import time
from pathlib import Path

import yaml

from kltune.demo.world import new_model, train_tokenizer
from kltune.recipe import load_recipe
from kltune.stages.sft import run_sft

TEXTS = ("The lamp is lovely and warm.", "The kettle is loud.", "The chair is old but strong.", "The book is good.")


def smoke_test(folder: Path, model: str | None) -> tuple[float, float]:
    """A step of ``kltune sft`` in a folder, on a model or one that is made there; seconds, and the KL it came to.

    Raises:
        KltuneError: what a run would raise.
    """
    if model is None:
        tokenizer = train_tokenizer(list(TEXTS))
        new_model(tokenizer, seed=0).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "The lamp"}) + "\n", encoding="utf-8")
    path = str(folder / "model") if model is None else str(Path(model).absolute()) if Path(model).is_dir() else model
    (folder / "smoke.yaml").write_text(yaml.safe_dump({
        "stage": "sft", "model": {"path": path}, "data": {"texts": "texts.jsonl"}, "sampling": {"max_new_tokens": 4},
        "optim": {"batch_size": 4}, "run": {"steps": 1, "output": "run", "loggers": []},
        "eval": {"prompts": "prompts.jsonl", "responses": 2},
    }), encoding="utf-8")
    began = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        result = run_sft(load_recipe(folder / "smoke.yaml"), resume=False)
    return time.monotonic() - began, result["kl"]["nats_per_response"]
