"""The command: results on stdout and nothing else, one message and one exit code for what the user can put right."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kltune import __version__
from kltune.cli import main
from kltune.cli.output import result_text
from kltune.errors import (
    BusyError,
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    ModelError,
    RecipeError,
    ScorerError,
    StorageError,
)
from kltune.recipe import load_recipe, packaged_recipes

ROOT = Path(__file__).parents[2]
PPO = """\
stage: ppo
model: {path: base}
data: {prompts: prompts.jsonl}
reward: [{kind: function, path: "rewards.py:score"}]
"""
RESULT = {
    "schema": "kltune.run/1", "status": "finished", "output": "runs/x", "final": "runs/x/final", "steps": 3,
    "kl": {"nats_per_response": 5.93, "stderr": 0.11, "ci95": [5.71, 6.15]}, "target": 6.0, "score": 1.5,
    "seconds": 2.0,
}


@pytest.fixture
def recipe(tmp_path):
    """A recipe that is right, as the text of its path."""
    (tmp_path / "rewards.py").write_text("def score(prompts, responses):\n    return [0.0] * len(responses)\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "base").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):     # looked for, and not opened
        (tmp_path / "base" / name).write_text("{}")
    file = tmp_path / "recipe.yaml"
    file.write_text(PPO)
    return str(file)


@pytest.fixture
def run(capsys):
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        out, err = capsys.readouterr()
        return left.value.code, out, err

    return run


@pytest.fixture
def stage(monkeypatch):
    """Put a function in the place of a module that would load a model: stage("kltune.stages.ppo", run_ppo=...)."""

    def put(module: str, **functions: object) -> None:
        fake = ModuleType(module)
        vars(fake).update(functions)
        monkeypatch.setitem(sys.modules, module, fake)

    return put


def shell(*arguments: str, code: str = "", stdout: int = subprocess.PIPE, cwd: Path = ROOT):
    """The command as a process of its own, or Python code that gets its arguments."""
    command = [sys.executable, *(("-c", code) if code else ("-m", "kltune")), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False
    )


def raising(error: BaseException):
    """A stage that fails."""

    def fail(*_: object) -> None:
        raise error

    return fail


# as a process


def test_the_version():
    done = shell("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"kltune {__version__}\n", "")


@pytest.mark.parametrize("arguments", [["ppo", "-r", "bad.yaml"], ["sft", "--recipe", "bad.yaml", "--json"],
                                       ["recipe", "check", "bad.yaml"], ["eval-kl", "x", "-r", "bad.yaml"]])
def test_a_wrong_recipe_ends_every_command_with_2_and_its_lines(arguments, tmp_path):
    (tmp_path / "bad.yaml").write_text(PPO + "kl:\n  targt: 3\n")
    done = shell(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("kltune: error: bad.yaml has ")
    assert "bad.yaml:6:3: kl.targt: unknown key; did you mean target?" in done.stderr
    assert "Traceback" not in done.stderr
    assert "\033" not in done.stderr


def test_help_and_recipes_do_not_import_torch(recipe):
    code = (
        "import sys\nfrom kltune.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    for arguments in (["--help"], ["recipe", "check", recipe], ["recipe", "list"], ["recipe", "schema"],
                      ["ppo", "-r", recipe, "--set", "kl.targt=3"], ["eval-kl", "--help"], ["sweep", "--help"],
                      ["frontier", "--help"], ["sweep", "-r", recipe, "--over", "kl.target=x", "-o", "out"]):
        done = shell(*arguments, code=code)
        assert done.returncode == 0, done.stderr


def test_a_reader_that_has_gone_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = shell("recipe", "schema", stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_without_a_reader_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = shell("--help", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_stdout_is_74():
    for command in (["recipe", "schema"], ["explain", "metrics"], ["--help"]):
        with open("/dev/full", "w") as full:
            done = shell(*command, stdout=full)
        assert done.returncode == 74
        assert re.match(r"kltune: error: cannot (write the result to stdout|read or write): No space left", done.stderr)
        assert "Traceback" not in done.stderr


# stages


def test_a_stage_gets_its_recipe_and_prints_one_json_document(recipe, run, stage, tmp_path):
    seen = []
    stage("kltune.stages.ppo", run_ppo=lambda loaded, resume: seen.append((loaded, resume)) or RESULT)
    folder = str(tmp_path / "out")
    sets = ["-s", "kl.target=4", "--set", "optim.lr=1e-5"]
    code, out, _ = run("ppo", "-r", recipe, *sets, "-o", folder, "--resume", "--json")
    assert (code, json.loads(out)) == (0, RESULT)
    (loaded, resume), = seen
    assert resume is True
    assert loaded == load_recipe(recipe, ["kl.target=4", "optim.lr=1e-5"], output=folder)


def test_without_json_the_result_is_said_in_a_few_lines(recipe, run, stage):
    stage("kltune.stages.ppo", run_ppo=lambda loaded, resume: RESULT)
    code, out, err = run("ppo", "-r", recipe)
    assert (code, err) == (0, f"ppo {recipe}: looking at what it names, then loading the libraries\n")
    assert "5.93 ± 0.11 nats per response, KL(policy‖reference), target 6" in out
    assert "runs/x/final" in out


def test_the_end_of_a_run_says_before_and_after_where_to_look_and_what_is_next(tmp_path):
    evaluated = {"eval/score_stderr": 0.06, "eval/reference_score_stderr": 0.02}
    result = RESULT | {"output": str(tmp_path), "reference_score": 0.06, "eval": evaluated}
    assert "  score   0.060 ± 0.020 → 1.50 ± 0.06\n" in result_text(result)
    assert result_text(result).endswith(f"\n  next    kltune eval-kl {tmp_path} --max-kl 7.5")
    assert result_text(result | {"hard_cap": 8.0}).endswith(" --max-kl 8")
    assert "page" not in result_text(result)

    (tmp_path / "report.html").touch()
    (tmp_path / "run.json").write_text(json.dumps({"schema": "kltune.run/1", "stage": "ppo", "status": "finished"}))
    (tmp_path / "recipe.yaml").write_text("stage: ppo\nkl: {target: 6.0}\n")
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert result_text(result).startswith(f"finished, on target: {tmp_path}\n")
    assert f"  page    {tmp_path / 'report.html'}\n" in result_text(result)


def test_the_kl_of_a_run_is_in_the_unit_of_its_target(tmp_path):
    kl = RESULT["kl"] | {"nats_per_response": 1.88, "nats_per_token": 0.188}
    told = result_text(RESULT | {"output": str(tmp_path), "kl": kl, "target": 0.2, "unit": "nats_per_token"})
    assert "  KL      0.188 nats per token, KL(policy‖reference), target 0.2\n" in told


def test_what_a_stage_made_is_for_the_next(tmp_path):
    made = {**RESULT, "final": str(tmp_path)}
    assert "reward: [{kind: model, path: " in result_text({**made, "stage": "reward"})
    assert f"next    model: {{path: {tmp_path}}}" in result_text({**made, "stage": "sft"})
    (tmp_path / "adapter_config.json").touch()
    assert f"next    model: {{sft_adapter: {tmp_path}}}" in result_text({**made, "stage": "sft"})


def test_a_kl_that_was_not_measured_is_not_called_zero():
    assert "not measured" in result_text({**RESULT, "kl": None})
    assert "not measured" in result_text({**RESULT, "kl": {"nats_per_response": None}})


def test_a_nan_is_never_printed_as_json(recipe, stage, capsys):
    stage("kltune.stages.ppo", run_ppo=lambda loaded, resume: {"score": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        main(["ppo", "-r", recipe, "--json"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("error", "code"), [
    (RecipeError("a"), 2), (DataError("a"), 5), (ScorerError("a"), 5), (ModelError("a"), 5), (CheckpointError("a"), 5),
    (DivergedError("a"), 6), (StorageError("a"), 74), (BusyError("a"), 75), (Interrupted("a", 2), 130),
    (Interrupted("a", 15), 143), (KeyboardInterrupt(), 130), (MemoryError(), 74),
    (OSError(errno.ENOSPC, "No space left on device", "x"), 74), (OSError(errno.EFBIG, "File too large"), 74),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 74),
    (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 74),
])
def test_every_kind_of_trouble_has_its_exit_code(error, code, recipe, run, stage):
    stage("kltune.stages.ppo", run_ppo=raising(error))
    left, out, err = run("ppo", "-r", recipe, "--json")
    assert (left, out) == (code, "")
    assert "Traceback" not in err
    if isinstance(error, MemoryError):
        assert "optim.micro_batch_size" in err      # what to lower


@pytest.mark.parametrize("error", [ZeroDivisionError("bug"), RuntimeError("bug"), OSError(errno.ENOTCONN, "bug")])
def test_a_bug_keeps_its_traceback(error, recipe, stage):
    stage("kltune.stages.ppo", run_ppo=raising(error))
    with pytest.raises(type(error), match="bug"):
        main(["ppo", "-r", recipe])


def test_libraries_are_told_to_be_quiet_before_a_stage_is_imported(recipe, run, stage, monkeypatch):
    names = ["HF_HUB_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM"]
    names.append("TRANSFORMERS_VERBOSITY")
    for name in names:
        monkeypatch.setenv(name, "")       # so that the fixture puts back what was there
        monkeypatch.delenv(name)
    seen = {}
    stage("kltune.stages.ppo", run_ppo=lambda loaded, resume: seen.update(os.environ) or RESULT)
    run("ppo", "-r", recipe)
    assert [seen[name] for name in names] == ["1", "1", "false", "error"]


def test_colour_is_for_terminals_that_want_it(recipe, run, monkeypatch):
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\033" not in run("ppo", "-r", "none.yaml")[2]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert run("ppo", "-r", "none.yaml")[2].startswith("\033[31mkltune: error:\033[0m ")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in run("ppo", "-r", "none.yaml")[2]


# eval-kl, demo


def test_eval_kl_passes_its_options_and_its_exit_code(run, stage, monkeypatch):
    seen = []
    document = {"schema": "kltune.eval_kl/1", "kl": {"exact": {"nats_per_response": 1.0}}}
    stage("kltune.stages.eval_kl", EvalKLOptions=dict,
          eval_kl=lambda checkpoints, options: seen.append((checkpoints, options)) or (document, 3))
    code, out, _ = run("eval-kl", "a", "b", "--max-kl", "8", "--unit", "nats_per_token", "--responses", "64",
                       "--direction", "both", "--json")
    assert (code, json.loads(out)) == (3, document)
    assert seen == [(["a", "b"], {
        "recipe": None, "reference": None, "base": None, "prompts": None, "responses": 64, "max_new_tokens": None,
        "temperature": None, "seed": 0, "max_kl": 8.0, "unit": "nats_per_token", "confidence": 0.95,
        "direction": "both", "texts": None, "top": 10, "show": 3, "auto": False, "max_responses": 4096,
        "top_p": None, "top_k": None, "trust_remote_code": False, "date": None, "device": "auto", "dtype": None,
        "against": (), "top_logprobs": 20, "key_env": None, "tokenizer": None, "transcripts": None,
    })]
    monkeypatch.setattr("kltune.cli.measure.eval_kl_text", lambda document, colour: "for people")
    code, out, _ = run("eval-kl", "a")
    assert (code, out) == (3, "for people\n")


@pytest.mark.parametrize("arguments", [
    ["--max-kl", "nan"], ["--max-kl", "inf"], ["--max-kl", "-1"], ["--max-kl", "0"],
    ["--confidence", "1"], ["--confidence", "nan"],
    ["--temperature", "0"], ["--temperature", "nan"], ["--responses", "1"], ["--unit", "bits"], ["--direction", "up"],
    ["--bogus", "1"], ["--top", "-1"], [], ["--responses", "1" + 21 * "0"], ["--seed", str(2**64)],
    ["--max-new-tokens", "1000000001"], ["--dtype", "float64"],
])
def test_wrong_options_and_none_at_all_are_2(arguments, run):
    code, out, err = run("eval-kl", *(["a", *arguments] if arguments else []))
    assert (code, out) == (2, "")
    assert "Traceback" not in err


@pytest.mark.parametrize(("arguments", "words"), [
    (["eval-kl", "a", "--reference", ""], "--reference: found nothing"),
    (["eval-kl", ""], "CHECKPOINT: found nothing"),
    (["eval-kl", "a", "--junit="], "--junit: found nothing"),
    (["report", "a", "-o", " "], "--output: found nothing"),
    (["compare", "a", "b", "--judge", ""], "--judge: found nothing"),
    (["frontier", "a", "--gold", ""], "--gold: found nothing"),
    (["frontier", "a", "--output", ""], "--output: found nothing"),
    (["ppo", "r.yaml", "--output", ""], "--output: found nothing"),
    (["recipe", "copy", "start/ppo", ""], "DEST: found nothing"),
    (["ppo", "r.yaml", "-o", "b\udcff"], r"--output: b\udcff is not UTF-8"),
    (["ppo", "r\udcff.yaml"], r"R.yaml: r\udcff.yaml is not UTF-8"),
    (["eval-kl", "a", "--prompts", "p\udcff.jsonl"], r"--prompts: p\udcff.jsonl is not UTF-8"),
    (["ppo", "r.yaml", "--set", "data.prompts=p\udcff"], r"--set: data.prompts=p\udcff is not UTF-8"),
])
def test_a_name_that_can_be_none_is_2_and_says_which_option(arguments, words, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert words in err.replace("\n", " ")


def test_dtype_auto_is_the_default(run, stage):
    seen = []
    stage("kltune.stages.eval_kl", EvalKLOptions=dict, eval_kl=lambda _, options: seen.append(options) or ({}, 0))
    run("eval-kl", "a", "--dtype", "auto", "--json")
    assert seen[0]["dtype"] is None


def test_junit_that_cannot_be_written_costs_no_measurement(run, stage, tmp_path):
    document = {"schema": "kltune.eval_kl/1", "checkpoint": "a", "gate": None, "kl": {"exact": {
        "nats_per_response": 1.0, "stderr": 0.1, "nats_per_token": 0.1}}}

    def eval_kl(*_: object) -> tuple[dict, int]:
        junit.parent.rmdir()
        return document, 0

    junit = tmp_path / "there" / "kl.xml"
    stage("kltune.stages.eval_kl", EvalKLOptions=dict, eval_kl=eval_kl)
    code, out, err = run("eval-kl", "a", "--junit", str(junit), "--json")
    assert (code, out) == (2, "")       # before anything is measured
    assert "there is no folder" in err
    junit.parent.mkdir()
    code, out, err = run("eval-kl", "a", "--junit", str(junit), "--json")
    assert (code, json.loads(out)) == (74, document)
    assert "kl.xml" in err


@pytest.mark.parametrize("command", ["eval-kl", "report", "frontier"])
def test_a_name_that_is_too_long_cannot_be_read_which_is_5(command, run):
    code, out, err = run(command, "x" * 5000)
    assert (code, out) == (5, "")
    assert "cannot be read" in err
    assert "cannot write" not in err


def test_a_current_folder_that_is_gone_is_74(recipe, run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = run("recipe", "check", "start/ppo")
    assert code == 74
    assert "the current folder is not there any more" in err


def test_a_home_of_nobody_is_a_folder_of_that_name(recipe, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("sweep", recipe, "--over", "run.seed=1", "-o", "~nobody-at-all/x", "--over", "kl.nothing=1")
    assert code == 2
    assert "kl.nothing" in err


def test_demo_prints_its_table(run, stage, tmp_path):
    stage(
        "kltune.demo.run",
        run_demo=lambda output, **_: {**RESULT, "output": str(output)},
        demo_text=lambda result: f"a table on {result['output']}",
    )
    code, out, _ = run("demo", "--output", str(tmp_path / "demo"), "--json")
    assert (code, json.loads(out)["output"]) == (0, str(tmp_path / "demo"))
    assert run("demo", "--output", "x")[:2] == (0, "a table on x\n")


# recipe commands


def test_check_prints_what_would_run_and_it_checks_again(recipe, run, tmp_path):
    code, out, err = run("recipe", "check", recipe, "--set", "kl.target=4")
    assert (code, err) == (0, "")
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert run("recipe", "check", str(again))[1] == out
    assert load_recipe(again) == load_recipe(recipe, ["kl.target=4"])


def test_schema_is_json(run):
    code, out, _ = run("recipe", "schema", "ppo")
    assert code == 0
    assert "kl" in json.loads(out)["properties"]
    assert run("recipe", "schema", "gpo")[0] == 2


def test_packaged_recipes_are_listed_shown_checked_and_copied(run, tmp_path):
    code, out, _ = run("recipe", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(packaged_recipes())
    for name, file in packaged_recipes().items():
        assert run("recipe", "show", name)[1] == file.read_text(encoding="utf-8").rstrip("\n") + "\n"
        assert run("recipe", "check", name)[0] == 0
        assert run("recipe", "copy", name, str(tmp_path / name))[0] == 0
        assert (tmp_path / name / file.name).read_bytes() == file.read_bytes()


def test_show_and_copy_refuse_what_is_not_there_or_in_the_way(recipe, run, tmp_path):
    assert run("recipe", "show", "no/such")[0] == 2
    assert run("recipe", "copy", recipe, str(tmp_path / "new"))[0] == 0
    code, out, err = run("recipe", "copy", recipe, str(tmp_path / "new"))
    assert (code, out) == (2, "")
    assert "already there" in err


def test_faults_become_annotations_on_github(recipe, run, monkeypatch):
    Path(recipe).write_text(PPO + "kl:\n  targt: 3\n")
    assert "::error" not in run("recipe", "check", recipe)[2]
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    _, out, err = run("recipe", "check", recipe)
    assert out == ""
    assert f"::error file={recipe},line=6,col=3::kl.targt: unknown key; did you mean target?" in err.splitlines()
