"""Secrets that a run meets wherever it may, however it ends: none is in anything that the run printed or left."""

import base64
import importlib.machinery
import json
import os
import signal
import sys
import types
from pathlib import Path
from urllib.parse import quote

import pytest
import torch

from kltune.cli import main
from kltune.run.subprocesses import STOP_SIGNALS
from tests.judges import Reply, serving
from tests.stages.conftest import DPO, ONLINE, PPO, REWARD, SFT, TRPO, write_recipe
from tests.stages.test_signals import ended

# Where each is planted; what it is called there is what everything that speaks of it here says.
ENVIRONMENT = {
    "JUDGE_KEY": "judge-4f9a81c2", "HF_TOKEN": "hf_QwErTyUiOpAsDfGhJkLz", "WANDB_API_KEY": "0a1b2c3d4e5f60718293",
    "DB_PASSWORD": "quo'te \"and\" \\ caf\u00e9", "AWS_SECRET_ACCESS_KEY": "wJalr/K7MDENG+bPxRfi",
}
PROXY_PASSWORD, DATABASE_PASSWORD = "pr0xy/p4ss-word", "d4ta-b4se-word"
TEXTS = {       # secrets of no variable of their own
    "in a URL": ("https://joe:{}@host/x", "url-user-81b2"), "in a query": ("GET /v1?api_key={}&n=1", "query-5d11ce"),
    "in a header": ("'Authorization': 'Bearer {}'", "header-9e1f20"), "a shape": ("{}", "sk-proj-Ab12Cd34Ef56Gh78"),
    "another shape": ("{}", "ghp_Zz11Yy22Xx33Ww44Vv55"),
}
SECRETS = [*ENVIRONMENT.values(), PROXY_PASSWORD, DATABASE_PASSWORD, *(secret for _, secret in TEXTS.values())]
SAID = "\n".join([*(text.format(secret) for text, secret in TEXTS.values()), *ENVIRONMENT.values(), PROXY_PASSWORD,
                  DATABASE_PASSWORD])
REWARDS = '''
import os, sys
SAID = open(os.environ["SAID_FILE"], encoding="utf-8").read()
print("imported", SAID)
def score(prompts, responses, calls=[]):
    """What is asked of a response."""
    print(SAID, file=sys.stderr)
    print(repr(SAID))
    calls.append(None)
    if len(calls) > 1 and os.environ["END"] == "crash":
        raise RuntimeError(SAID)
    return [float(response.count("a")) for response in responses]

def few(prompts, responses):
    """The same, and another scorer."""
    return score(prompts, responses)
'''
STAGES = {"ppo": PPO, "trpo": TRPO, "online": ONLINE, "dpo": DPO, "sft": SFT, "reward": REWARD}
ENDS = {"success": 0, "crash": 5, "bug": 99, "signal": 143, "judge": 75}
SCORED = ("ppo", "trpo", "online")


def test_there_are_twelve():
    assert len(set(SECRETS)) == 12


def forked(arguments: list[str], folder: Path, end: str) -> int:
    """``kltune ...`` in a fork with streams of its own, which ends in a bug of kltune's, by a signal or as it does."""
    if pid := os.fork():
        return pid
    code = 99
    try:
        for number, name in enumerate(("out", "err"), start=1):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        from kltune.run.recorder import Report

        record = Report.step

        def step(self: Report, now: int, metrics: dict) -> None:
            record(self, now, metrics)
            if end == "bug":
                raise AssertionError(SAID)
            if end == "signal":
                signal.raise_signal(signal.SIGTERM)

        Report.step = step
        main(arguments)
    except SystemExit as left:
        code = left.code or 0
    finally:
        if code == 99:      # as the interpreter does it
            sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
        os._exit(code)


def telling_wandb(folder: Path) -> types.ModuleType:
    """A logger that writes down all it is told."""
    def told(*arguments: object, **options: object) -> object:
        with open(folder / "wandb-told", "a", encoding="utf-8") as file:
            print(arguments, options, file=file)
        return types.SimpleNamespace(log=told, finish=told)

    module = types.ModuleType("wandb")
    module.init, module.Settings, module.__spec__ = told, dict, importlib.machinery.ModuleSpec("wandb", None)
    return module


def in_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def leaks(folder: Path) -> list[tuple[str, str]]:
    """Every file under a folder with each secret that it holds in any form."""
    forms = {secret: {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], quote(secret, safe=""),
                      in_base64(secret)} for secret in SECRETS}
    forms[PROXY_PASSWORD].add(in_base64(f"joe:{PROXY_PASSWORD}"))
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [(str(path.relative_to(folder)), secret) for path, content in files.items()
            for secret, shapes in forms.items() if any(form.encode() in content for form in shapes)]


@pytest.mark.parametrize(("stage", "end"), [
    pytest.param(stage, end, marks=() if (stage, end) in (("ppo", "judge"), ("trpo", "crash")) else pytest.mark.stress)
    for stage in STAGES for end in ENDS if stage in SCORED or end in ("success", "bug", "signal")
])
def test_no_secret_is_in_anything_that_a_run_leaves(llama, tmp_path, monkeypatch, record_property, stage, end):
    left, planted = tmp_path / "left", tmp_path / "planted"
    left.mkdir()
    prompts = tuple(f"{text.format(secret)} " for text, secret in TEXTS.values())
    file = write_recipe(planted, STAGES[stage], llama, prompts)
    (planted / "rewards.py").write_text(REWARDS)
    (planted / "said").write_text(SAID, encoding="utf-8")
    proxy = quote(PROXY_PASSWORD, safe="")
    for name, value in (ENVIRONMENT | {"SAID_FILE": str(planted / "said"), "END": end}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DATABASE_URL", f"postgres://joe:{DATABASE_PASSWORD}@host/db")
    monkeypatch.setenv("https_proxy", f"http://joe:{proxy}@127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "wandb", telling_wandb(left))

    def answer(count: int, question: str) -> Reply:
        if end == "judge" and count > 20:       # as a proxy that tells what it was asked
            return Reply(status=503, body=json.dumps([endpoint.headers[-1], SAID]).encode())
        return Reply('{"score": 5} ' + SAID if count else SAID)

    with serving(answer) as endpoint:
        # A judge in clear text gets no key: the proxy is between, and on this machine it is asked with one.
        address, key = endpoint.url, "JUDGE_KEY"
        if end == "judge":
            monkeypatch.setenv("http_proxy", f"http://joe:{proxy}@{endpoint.url.split('/')[2]}")
            address, key = "http://judge.invalid/v1", None
        judge = {"kind": "judge", "url": address, "model": "m", "key_env": key, "retries": 1, "timeout_s": 20.0,
                 "rubric": f"Judge. {SAID}"}
        sets = ["run.steps=2", "run.eval_every=1", 'run.loggers=["tensorboard", "wandb"]']
        if stage in SCORED:
            sets.append(f"reward={json.dumps([STAGES[stage]['reward'][0], judge])}")
        if stage != "reward":
            sets.append('eval.gold={"kind": "function", "path": "rewards.py:few"}')
        words = [word for one in sets for word in ("--set", one)]
        monkeypatch.setattr(sys, "argv", ["kltune", STAGES[stage]["stage"], *words])
        pid = forked([STAGES[stage]["stage"], "-r", str(file), "-o", str(left / "run"), "--json", *words], left, end)
        assert ended(pid) == ENDS[end], (left / "err").read_text()
        asked, headers = len(endpoint.asked), json.dumps(endpoint.headers)
    assert asked > 0 if stage in SCORED else asked == 0
    carried = in_base64(f"joe:{PROXY_PASSWORD}") if end == "judge" else ENVIRONMENT["JUDGE_KEY"]
    assert carried in headers or stage not in SCORED        # it did go where it was meant for
    assert leaks(planted)
    assert leaks(left) == []
    assert "[redacted]" in (left / "err").read_text() or stage == "reward"
    assert {"err", "run/run.json", "run/recipe.yaml"} <= {str(path.relative_to(left)) for path in left.rglob("*")}
    record_property("runs with 12 secrets", 1)
