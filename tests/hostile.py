"""Files as strangers may give them: odd, damaged, or made to run code; each kind as a change to a sound folder."""

import json
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTENTS = {      # whole files
    "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"3", "nan": b"NaN",
    "infinite": b'{"a": 1e999}',
    "brace": b"{", "deep": b"[" * 100_000, "latin": '{"é": 1}'.encode("latin-1"), "nul": b"\0" * 64, "object": b"{}",
    "utf-16": '{"a": 1}'.encode("utf-16"), "list of objects": b"[{}]", "long number": b'{"step": ' + b"9" * 5000 + b"}",
}
VALUES: dict[str, Any] = {    # of one field
    "null": None, "text": "x", "list": [], "object": {}, "negative": -1, "zero": 0, "fraction": 0.5, "huge": 10**30,
    "true": True, "list of null": [None], "nested": {"a": {"b": [1, {"c": None}]}}, "surrogate": "\ud800", "empty": "",
    "escape": "\x1b[31m\r\n::error::x",
}


class Hung(BaseException):
    """Something took longer than it may."""


@contextmanager
def watchdog(seconds: float) -> Iterator[None]:
    """Within: ``Hung`` is raised in the main thread after some seconds, if Python gets a word in there."""
    def bark(*_: object) -> None:
        raise Hung(f"longer than {seconds} s")

    before = signal.signal(signal.SIGUSR2, bark)
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)


@dataclass(frozen=True)
class Change:
    """One change to a sound folder; name: what it is called in a report."""

    name: str
    make: Callable[[Path], None]


def whole_files(file: str) -> Iterator[Change]:
    """Every content instead of a file's own."""
    for kind, content in CONTENTS.items():
        yield Change(f"{file}: {kind}", lambda folder, content=content: write(folder / file, content))
    yield Change(f"{file}: cut", lambda folder: write(folder / file, (folder / file).read_bytes()[: -20]))
    yield Change(f"{file}: a folder", lambda folder: ((folder / file).unlink(), (folder / file).mkdir()))
    yield Change(f"{file}: a pipe", lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file)))
    for kind, target in (("a device", "/dev/zero"), ("a link to nothing", "no")):
        yield Change(f"{file}: {kind}", lambda folder, target=target: (
            (folder / file).unlink(), (folder / file).symlink_to(target)))
    yield Change(f"{file}: gone", lambda folder: (folder / file).unlink())


def single_fields(folder: Path, file: str) -> Iterator[Change]:
    """Every field of a JSON file, one level down as well, with every other value, and without it."""
    document = json.loads((folder / file).read_bytes())
    for steps in places(document):
        for kind, value in VALUES.items():
            yield Change(
                f"{file}: {'.'.join(map(str, steps))} is {kind}",
                lambda folder, steps=steps, value=value: edit(folder / file, steps, value),
            )
        yield Change(f"{file}: no {'.'.join(map(str, steps))}", lambda folder, steps=steps: edit(folder / file, steps))


def places(document: Any, depth: int = 2) -> Iterator[tuple[int | str, ...]]:
    """Where a document has values, to a depth."""
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    for step, value in list(inside)[:40]:
        yield (step,)
        if depth > 1 and isinstance(value, dict | list) and value:
            yield from ((step, *rest) for rest in places(value, depth - 1))


def edit(path: Path, steps: tuple[int | str, ...], *value: Any) -> None:
    """Put a value into a JSON file, or take out what is there."""
    document = json.loads(path.read_bytes())
    holder = document
    for step in steps[:-1]:
        holder = holder[step]
    if value:
        holder[steps[-1]] = value[0]
    else:
        del holder[steps[-1]]
    write(path, json.dumps(document).encode())


def write(path: Path, content: bytes) -> None:
    """Replace a file, not what else may have its name."""
    path.unlink()
    path.write_bytes(content)


class Trap:
    """A pickle that leaves a folder when it is opened."""

    def __init__(self, sprung: Path):
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sprung),)


def traps(sprung: Path) -> Iterator[Change]:
    """Ways to have code run, or a file outside opened, by a folder of a model or an adapter."""
    pickled = pickle.dumps(Trap(sprung))
    python = f"import os\nos.makedirs({str(sprung)!r}, exist_ok=True)\nclass Model: pass\n"

    def put(folder: Path, name: str, content: bytes) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    def key(file: str, **keys: Any) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            put(folder, "modeling.py", python.encode())
            document = json.loads((folder / file).read_bytes()) if (folder / file).exists() else {}
            put(folder, file, json.dumps(document | keys).encode())
        return change

    def index(target: str) -> Callable[[Path], None]:
        def change(folder: Path) -> None:
            put(folder, "model-00001.bin", pickled)
            put(folder.parent, "elsewhere.safetensors", b"")
            mapped = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": target}}
            put(folder, "model.safetensors.index.json", json.dumps(mapped).encode())
        return change

    auto = {"AutoConfig": "modeling.Model", "AutoModelForCausalLM": "modeling.Model", "AutoTokenizer":
            ["modeling.Model", "modeling.Model"], "AutoModelForSequenceClassification": "modeling.Model"}
    for file in ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json"):
        yield Change(f"auto_map in {file}", key(file, auto_map=auto))
        yield Change(f"trust in {file}", key(file, trust_remote_code=True, auto_map=auto))
    for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        yield Change(f"{name}: x/y", key("config.json", **{name: "someone/kernels"}))
    yield Change("megatron_core", key("adapter_config.json", megatron_config={"a": 1}, megatron_core="modeling"))
    yield Change("custom_generate", key("generation_config.json", custom_generate="someone/generate"))
    for target in ("model-00001.bin", "../elsewhere.safetensors", "/etc/passwd", "a/b.safetensors", "..\u2215x.pt"):
        yield Change(f"index to {target}", index(target))
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "training_args.bin", "optimizer.pt"):
        yield Change(f"{name} beside", lambda folder, name=name: put(folder, name, pickled))
        yield Change(f"{name} alone", lambda folder, name=name: (
            [path.unlink() for path in folder.glob("*.safetensors")], put(folder, name, pickled)))
    for name in ("vocab_file", "tokenizer_file", "merges_file"):
        yield Change(f"{name} outside", key("tokenizer_config.json", **{name: "/etc/passwd"}))
    weights = ("model.safetensors", "adapter_model.safetensors")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", *weights):
        yield Change(f"{name} is a link out", lambda folder, name=name: (
            (folder / name).unlink(missing_ok=True), (folder / name).symlink_to("/etc/passwd")))


def slow(folder: Path) -> Iterator[Change]:
    """What takes for ever: expressions, templates, and models that are described larger than they are."""
    chat = folder / "tokenizer_config.json"
    for template in (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**12 }}",
        "{{ 'a' * 10**8 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 9**9**9 }}",
    ):
        if chat.exists():
            yield Change(f"template {template}", lambda at, template=template: edit(
                at / "tokenizer_config.json", ("chat_template",), template))
    adapter = (folder / "adapter_config.json").exists()
    for pattern in ("(.*.*.*.*)*x", "([a-z._0-9]+)+$x", "(a|a|.)*(a|.)*(a|.)*!"):
        if adapter:
            yield Change(f"targets {pattern}", lambda at, pattern=pattern: edit(
                at / "adapter_config.json", ("target_modules",), pattern))
            yield Change(f"ranks {pattern}", lambda at, pattern=pattern: edit(
                at / "adapter_config.json", ("rank_pattern",), {pattern: 4}))
    for name in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        if not adapter:
            yield Change(f"a large {name}", lambda at, name=name: edit(at / "config.json", (name,), 10**9))
