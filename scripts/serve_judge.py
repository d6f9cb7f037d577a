"""A local AI judge: a language model behind ``transformers serve``, as recipes/tiny/ppo_judge.yaml asks for one.

    python scripts/serve_judge.py                         serves on 127.0.0.1:8000 until Ctrl-C
    python scripts/serve_judge.py --model PATH-OR-NAME    the same with an instruct model of your own
    python scripts/serve_judge.py --check                 tries runs, a judge that dies and --resume on it, and ends

What it makes lies in build/serve and is made once: an environment for the server, which sees the packages of this one
and adds FastAPI, Uvicorn and openai, for which it needs the network; the tiny world; and, without --model, a judge
(train_judge.py), in about 10 minutes on two cores.

--check exits with 0 only if the judge's scores can be read and follow its rule; two runs of ``kltune ppo``, one of
which lost its server half-way and was resumed, end with the same weights and the same answers, none asked for twice;
and ``kltune dpo`` gets through with its preferences.
"""

import argparse
import http.client
import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from train_judge import measured, train_judge

from kltune.demo.world import make_tiny_world
from kltune.lm.rewards.judge import Judge
from kltune.recipe import JudgeReward, copy_recipe, load_recipe

PACKAGES = ("fastapi", "uvicorn", "openai")
RECIPES = {"ppo": "ppo_judge", "dpo": "dpo_online"}
HELD_OUT = 200          # questions
SHORT = ("model.sft_adapter=null", "run.steps=3", "run.eval_every=100", "eval.responses=16", "reward.0.retries=1")
SAMPLING = {"ppo": "sampling={prompts_per_step: 16, max_new_tokens: 48}",
            "dpo": "sampling={prompts_per_step: 8, responses_per_prompt: 2, max_new_tokens: 48}"}
say = partial(print, file=sys.stderr, flush=True)


@dataclass
class Server:
    """How ``transformers serve`` is started: in ``folder``, so that what lies there is a model's name."""

    python: Path
    folder: Path
    model: str
    port: int

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen]:
        """Within: it answers, its model loaded."""
        if self.healthy():
            sys.exit(f"port {self.port} is taken; choose another one with --port")
        with open(self.log, "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                [self.python, *self.command, "--host", "127.0.0.1", "--port", str(self.port)], cwd=self.folder,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )
        try:
            while not self.healthy():
                if process.poll() is not None:
                    sys.exit(f"the server ended with exit code {process.returncode}; {self.log} says why")
                time.sleep(0.2)
            yield process
        finally:
            self.kill(process)

    @property
    def command(self) -> list[str]:
        """What its python is given, but for the address."""
        return ["-m", "transformers.cli.transformers", "serve", self.model]

    def kill(self, process: subprocess.Popen) -> None:
        """End it at once."""
        process.kill()
        process.wait()

    @property
    def log(self) -> Path:
        """What it says."""
        return self.folder / "server.log"

    def answered(self) -> int:
        """How many questions it has answered in all its lives."""
        return self.log.read_text(encoding="utf-8").count('/v1/chat/completions HTTP/1.1" 200')

    def healthy(self) -> bool:
        """Whether a server answers at the port; this one does once the model on its command line is loaded."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)) as connection:
            try:
                connection.request("GET", "/health")
                return connection.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False


def make_environment(folder: Path) -> Path:
    """The server's environment in ``folder``, and its interpreter; nothing is installed into the one that runs this."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "ready").exists():
        say(f"an environment for the server, with {', '.join(PACKAGES)}: {folder}")
        venv.create(folder, with_pip=True, clear=True)
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        own = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
        shared = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
        (own / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True, stdout=sys.stderr)
        (folder / "ready").touch()
    return python


def check(server: Server, entry: JudgeReward, trained: bool) -> None:
    """Try all that the module promises, print what happened, and exit where a promise is not kept."""
    whole, broken, pairs = (server.folder / "runs" / name for name in ("ppo_whole", "ppo_broken", "dpo_pairs"))
    for run in (whole, broken, pairs):
        shutil.rmtree(run, ignore_errors=True)

    def report(holds: bool, text: str) -> None:
        print(f"{'ok' if holds else 'FAILED':<8}{text}", flush=True)
        if not holds:
            sys.exit(1)

    with server.serving() as process:
        began = time.monotonic()
        share, correlation, agreement = measured(entry, HELD_OUT)
        each = (time.monotonic() - began) / HELD_OUT
        report(not trained or (share > 0.9 and correlation > 0.5),
               f"{HELD_OUT} held-out questions, {each:.2f} s each: {share:.0%} of the answers readable, correlation of "
               f"the scores with the rule {correlation:.2f}, {agreement:.0%} of the preferences right")
        before = server.answered()
        code = kltune("ppo", whole, entry).wait()
        said, asked = answers(whole), server.answered() - before
        report(code == 0 and asked >= len(said) > 0, f"ppo: exit code {code}, {asked} questions, {len(said)} kept")
        run = kltune("ppo", broken, entry)
        while run.poll() is None and len(answers(broken)) < len(said) // 2:
            time.sleep(0.05)
        process.kill()
        code, status = run.wait(), json.loads((broken / "run.json").read_text())["status"]
        kept = answers(broken)
        report((code, status) == (75, "interrupted"), f"server killed: exit code {code}, {status}, {len(kept)} kept")

    with server.serving():
        code = kltune("ppo", broken, entry, "--resume").wait()
        found, lost = answers(broken), server.answered() - before - 2 * asked
        once = found[: len(kept)] == kept and sorted(found) == sorted(said) and lost <= entry.concurrency
        report(code == 0 and once, f"--resume: exit code {code}, {len(found)} kept, none asked for again and all as in "
               f"the run before; {lost} answers were on their way when the server was killed")
        final = {(run / "final" / "adapter_model.safetensors").read_bytes() for run in (whole, broken)}
        report(len(final) == 1, "the weights of both runs: equal, bit for bit")
        code = kltune("dpo", pairs, entry.model_copy(update={"mode": "pair"})).wait()
        rows = [json.loads(line) for line in (pairs / "metrics.jsonl").read_text().splitlines()]
        counts = [int(row["pairs/count"]) for row in rows]
        report(code == 0 and len(rows) == 3, f"dpo on preferences: exit code {code}, pairs of each step: {counts} of 8")


def answers(run: Path) -> list[str]:
    """The lines of a run's judge.jsonl."""
    return [line for file in run.glob("judge.jsonl") for line in file.read_text().splitlines()]


def kltune(stage: str, output: Path, entry: JudgeReward, *more: str) -> subprocess.Popen:
    """A short run on the tiny model, started."""
    reward = f"reward={json.dumps([entry.model_dump(exclude_unset=True)])}"
    files = ("--recipe", output.parents[1] / f"{RECIPES[stage]}.yaml", "--output", output)
    keys = [f"--set={key}" for key in (reward, SAMPLING[stage], *SHORT)]
    command = [sys.executable, "-m", "kltune", stage, *map(str, files), *more, *keys]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def main() -> None:
    """Make what is missing; then serve, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of an instruct model; without it, one is trained")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "build" / "serve")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--check", action="store_true", help="try runs on it and end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # or the server would outlive this process
    folder = arguments.folder.resolve()
    python = make_environment(folder / "env")
    make_tiny_world(folder, say=say)
    for name in RECIPES.values():
        if not (folder / f"{name}.yaml").exists():
            copy_recipe(f"tiny/{name}", folder)
    trained, model = arguments.model is None, arguments.model or "judge"
    if not trained and Path(model).is_dir():
        model = str(Path(model).resolve())      # the server runs in another folder
    keys = (f"reward.0.url=http://127.0.0.1:{arguments.port}/v1", f"reward.0.model={model}")
    entry = load_recipe(folder / "ppo_judge.yaml", keys).reward[0]
    if trained and not (folder / "judge").exists():
        train_judge(folder, Judge(entry, "judge"))
    server = Server(python, folder, model, arguments.port)
    if arguments.check:
        return check(server, entry, trained)
    with server.serving() as process:
        sets = " ".join(f"--set {key}" for key in ("model.sft_adapter=null", *keys))
        say(f"it answers until Ctrl-C (log: {server.log}): kltune ppo --recipe {folder / 'ppo_judge.yaml'} {sets}")
        with suppress(KeyboardInterrupt):
            process.wait()


if __name__ == "__main__":
    main()
