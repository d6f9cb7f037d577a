"""What the README and the guides show is run, block by block and as it is typed, in a place with tiny models.

Steps and responses are made few by options put behind each command. Some blocks always run, all of them by `make
stress`. What cannot run here is named with its reason.
"""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import kltune.demo.world
from kltune.cli import main
from kltune.demo.run import RECIPES
from kltune.recipe import copy_recipe, load_recipe
from kltune.run import subprocesses
from tests.judges import Reply, serving
from tests.servers import StandIn, standing_in
from tests.stages.conftest import write_rows
from tests.stages.test_sweep import Forked
from tests.test_readme import BLOCKS, ROOT, TEXTS

NOT_RUN = {
    "make demo": "installs from an index first; tests/demo walks the same walk",
    "make test": "is what runs this", "make bench-peers": "takes hours, and installs TRL",
    ". .venv/bin/activate": "is of a shell with an environment of its own",
    "make stress": "is what runs this",
    "python scripts/bench.py": "takes minutes; tests/test_bench.py runs it in small",
    "pip ": "asks an index, for packages or for the build's backend",
    "transformers serve": "wants an instruct model and an extra of transformers; tests/judges.py listens instead",
    "mv $@.tmp $@": "make runs it", "kltune demo": "takes minutes; tests/demo walks the same walk",
}
FEW = ("run.steps=1", "sampling.max_new_tokens=4", "eval.responses=4")
STAGE = {
    "sft": (*FEW, "optim.batch_size=2"), "reward": ("run.steps=1", "optim.batch_size=2"),
    "dpo": (*FEW, "optim.batch_size=2", "sampling.prompts_per_step=16"), "ppo": (*FEW, "sampling.prompts_per_step=16"),
    "trpo": (*FEW, "sampling.prompts_per_step=16"), "sweep": (*FEW, "sampling.prompts_per_step=16"),
    "distill": (*FEW, "sampling.prompts_per_step=16"),
}
FEWER = {"eval-kl": ["--responses", "8"], "project": ["--responses", "8"], "frontier": ["--best-of", "2"]}
CODES = {"eval-kl": {0, 3, 4}}      # the gate is a result
STANDS_FOR = {
    "CHECKPOINT...": "runs/first", "CHECKPOINT": "runs/first", "RUN...": "runs/first", "DIR": "scaled", "TEXT": "w6",
    "[STAGE]": "", r"list\|show\|copy\|check\|schema": "list", r"TOPIC\|KEY\|METRIC\|CODE": "hacking", "...": "maths",
    "METRIC": "score/mean", "COMMAND": "ppo", "A": "runs/ppo", "B|reference": "reference", "P": "prompts.jsonl",
}
JUDGE, RELEASE, BASE = "URL#MODEL", "http://127.0.0.1:8000/v1#release", "https://host/v1#base"   # who others are
JUDGED = "http://127.0.0.1:8000/v1#judge"
DISTILL = """stage: distill
model: {path: my-model}
data: {prompts: prompts.jsonl}
distill: {teacher: runs/ppo}
run: {output: runs/distill}
"""
POPEN = subprocess.Popen
LINE = re.compile(r"^(?:\$ |- run: )?((?:kltune|make|pip|python|transformers|mv|for|\.) .*)$")
TYPED = [
    (name, language, [match[1] for line in re.sub(r"\\\n\s*", "", text).splitlines()
                      if (match := LINE.match(line.strip()))])
    for name, language, text in BLOCKS if language not in ("python",)
]
TYPED = [block for block in TYPED if block[2]]
INLINE = sorted({line for text in TEXTS.values() for line in re.findall(r"`((?:kltune|make|pip) [^`]+)`", text)})
NEW = ("kltune recipe check first.yaml", "kltune init ppo")     # what begins these needs no runs, and always runs
SPOKEN_OF = ("kltune explain", "kltune recipe")


def marked(lines: list[str], at: str) -> object:
    """A block as a parameter; most are for `make stress`."""
    quick = lines[0].startswith(NEW)
    return pytest.param(lines, id=f"{at}: {lines[0]}", marks=() if quick else pytest.mark.stress)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, tiny_model) -> Path:
    """A folder with what a newcomer has: a model, data, the README's recipe and reward."""
    place = tmp_path_factory.mktemp("fresh")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(tiny_model("llama"), "my-model")
        words = Path("my-model/tokenizer.json")
        words.write_text(words.read_text().replace('"w5"', '"happy"'))      # which the README's reward pays for
        prompts = [{"prompt": f"w{6 + number % 9} w{6 + number // 9}"} for number in range(32)]
        pairs = [row | {"chosen": "happy w6", "rejected": "w6"} for row in prompts]
        texts = [row | {"response": "happy w6"} for row in prompts]
        for name, rows in {"prompts": prompts, "held_out": prompts, "pairs": pairs, "texts": texts}.items():
            write_rows(Path(f"{name}.jsonl"), rows)
        blocks = {language: text for name, language, text in BLOCKS if name == "README.md"}
        Path("first.yaml").write_text(blocks["yaml"])
        Path("rewards.py").write_text(blocks["python"])
    return place


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory, fresh) -> Path:
    """The same with what the guides take for granted: recipes, runs, a sweep, a curve, the folder of a demo."""
    place = shutil.copytree(fresh, tmp_path_factory.mktemp("typed") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("kltune.train.evaluation.finish.write_page", lambda folder: None)
        patch.setattr(subprocesses.subprocess, "Popen", Forked)
        shutil.copy("first.yaml", "R.yaml")
        for folder in ("kltune-demo", "rlhf"):
            shutil.copytree("my-model", f"{folder}/model")
            for name in RECIPES if folder == "kltune-demo" else ():
                copy_recipe(f"tiny/{name}", Path(folder))
            Path(folder, "data").mkdir()
            for name in ("prompts", "pairs", "texts"):
                shutil.copy(f"{name}.jsonl", f"{folder}/data/eval_{name}.jsonl")
                shutil.copy(f"{name}.jsonl", f"{folder}/data/{name}.jsonl")
            shutil.copy("texts.jsonl", f"{folder}/data/heldout.jsonl")
        for stage, rows in {"trpo": "prompts", "sft": "texts", "reward": "pairs", "dpo": "pairs"}.items():
            more = ["--reward", "rewards.py"] if stage == "trpo" else []
            run(["init", stage, "--model", "my-model", "--prompts", f"{rows}.jsonl", *more])
        for name in ("ppo", "my", "eval-kl"):
            shutil.copy("first.yaml", f"{name}.yaml")
        Path("distill.yaml").write_text(DISTILL)
        for name in ("models/chat", "models/chat-4bit", "path/to/model"):
            shutil.copytree("my-model", name)
        run(["ppo", "first.yaml"])
        for name in ("ppo", "far", "a", "b", "trpo...", "dpo_online", "dpo", "new", "last"):
            shutil.copytree("runs/first", f"runs/{name}")
        run(["merge", "runs/ppo", "--output", "release"])
        for name in ("release", "qlora"):
            shutil.copytree("runs/first/final", f"adapters/{name}")
        with open("rewards.py", "a") as file:
            file.write("\n\ngold = score\n")
        run(["sweep", "R.yaml", "--over", "kl.target=9", "--over", "run.seed=0", "-o", "sweeps/target"])
        shutil.copytree("sweeps/target", "sweeps/ppo")
        run(["project", "runs/far", "--curve", "--recipe", "R.yaml", "--output", "curve"])
        for name in ("sft", "ppo_target"):
            run([name[:3], f"kltune-demo/{name}.yaml"])
        shutil.copytree("kltune-demo/runs/sft", "rlhf/runs/sft")
    return place


@pytest.fixture
def place(request, tmp_path, monkeypatch) -> Path:
    """A copy of it, or of a fresh one where that will do, as the current folder."""
    lines = request.node.callspec.params.get("lines", [""])
    origin = request.getfixturevalue("fresh" if lines[0].startswith(NEW) else "lived_in")
    folder = shutil.copytree(origin, tmp_path / "place")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(subprocesses.subprocess, "Popen", Forked)
    return folder


def run(words: list[str]) -> None:
    """Run a kltune command in this process, made small, in place of what it wrote before."""
    command = words[0]
    more = [word for key in STAGE.get(command, ()) for word in ("--set", key)] + FEWER.get(command, [])
    if "--output" in words and command != "init":
        shutil.rmtree(words[words.index("--output") + 1], ignore_errors=True)
    if command in STAGE and command != "sweep" and "--help" not in words:
        file = next(word for word in words[1:] if word.endswith(".yaml"))
        shutil.rmtree(load_recipe(file).run.output, ignore_errors=True)
    with pytest.raises(SystemExit) as left:
        main(words if "--help" in words else [*words, *more])
    assert left.value.code in CODES.get(command, {0}), words


def type_in(line: str) -> None:
    """Do what a line of a shell says."""
    line = re.split(r"\s+#|; | > ", line)[0].strip() if not line.startswith("for ") else line
    if any(line.startswith(other) for other in NOT_RUN):
        return
    if loop := re.match(r"for (\w+) in (.*); do (.*); done", line):
        for value in loop[2].split():
            type_in(loop[3].replace(f"${loop[1]}", value))
    elif line.startswith("python "):
        words = shlex.split(line)[1:]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            patch.setattr(kltune.demo.world, "make_tiny_world", partial(kltune.demo.world.make_tiny_world, steps=3))
            for name in ("model", "data"):      # of the place, which this is to make
                shutil.rmtree(Path(words[-1], name))
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    else:
        assert line.startswith("kltune "), f"{line}: run it here, or say in NOT_RUN why it is not"
        with pytest.MonkeyPatch.context() as patch:
            if "--processes" in line:       # are started, not forked
                patch.setattr(subprocess, "Popen", POPEN)
                patch.setenv("PYTHONPATH", str(ROOT))
            run(shlex.split(line)[1:])


@pytest.mark.parametrize("lines", [marked(lines, name) for name, language, lines in TYPED if language != "make"])
def test_a_block_of_commands_can_be_typed(lines, place, monkeypatch):
    monkeypatch.setenv("SERVER_KEY", "secret")
    answer = "A" if any("kltune compare" in line for line in lines) else "7"      # which of two, or how good
    with serving(lambda number, question: Reply(answer)) as judge, ExitStack() as servers:
        for line in lines:
            line = line.replace(JUDGED, f"{judge.url}#m")
            asks = f" --set reward.0.url={judge.url}" if "ppo_judge.yaml" in line else ""
            type_in(with_servers(line, servers) + asks)


def with_servers(line: str, servers: ExitStack) -> str:
    """A line with stand-ins in place of the servers that it names."""
    for url, folder in {RELEASE: "release", BASE: "my-model"}.items():
        if url in line:
            model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
            standing = StandIn(model.eval(), tokenizer, name=url.partition("#")[2])
            line = line.replace(url, servers.enter_context(standing_in(standing)).url)
    return line


@pytest.mark.stress
@pytest.mark.parametrize("text", [text for _, language, text in BLOCKS if language == "make"])
def test_a_makefile_does_what_it_says(text, place, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", POPEN)
    (place / "bin").mkdir()
    (place / "bin" / "kltune").write_text(f'#!/bin/sh\nexec {sys.executable} -m kltune "$@"\n')
    (place / "bin" / "kltune").chmod(0o755)
    (place / "Makefile").write_text(text)
    environment = os.environ | {"PATH": f"{place}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["make"], env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert (place / "kl.json").exists()


def typed(line: str) -> str:
    """A line with real words where it has words that stand for others."""
    for words, stand_in in STANDS_FOR.items():
        line = re.sub(rf"(?<=\s){re.escape(words)}(?=\s|$)", stand_in, line)
    return re.sub(r" R$", f" {line.split()[1]}.yaml", line)


def is_spoken_of(line: str) -> bool:
    """Whether no more is said than the name of a command, or of an option that it has."""
    return all(word.startswith("--") for word in line.split()[2:]) or line.startswith(SPOKEN_OF)


@pytest.mark.parametrize("lines", [marked([line], "inline") for line in INLINE if not is_spoken_of(typed(line))])
def test_a_command_in_a_sentence_can_be_typed(lines, place):
    with serving(lambda number, question: Reply("A")) as judge:
        type_in(typed(lines[0]).replace(JUDGE, f"{judge.url}#m"))


@pytest.mark.parametrize("line", [line for line in map(typed, INLINE) if is_spoken_of(line)])
def test_a_command_that_is_spoken_of_is_there_with_its_options(line, capsys):
    if any(line.startswith(other) for other in NOT_RUN):
        return
    command, *words = shlex.split(line)[1:]
    whole = command == "explain" or words == ["list"]
    run([command, *words] if whole else [command, *(word for word in words if word[0] != "-"), "--help"])
    out = capsys.readouterr().out
    assert all(word in out for word in words if word.startswith("--"))


def test_what_is_not_run_is_what_is_shown():
    shown = [*INLINE, *(line for _, _, lines in TYPED for line in lines)]
    assert [line for line in NOT_RUN if not any(other.startswith(line) for other in shown)] == []
