"""``kltune sample``: what plain transformers says with the same numbers, prompts from everywhere, and its refusals."""

import io
import shutil

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.lm.data.examples import Prompt
from kltune.lm.measure.measurement import Round
from kltune.lm.model.sampler import Draw
from kltune.recipe import DataSection
from kltune.run.saved_policy import Settings
from kltune.stages.ppo import run_ppo
from kltune.stages.sample import template_of_typed
from tests.stages.conftest import write_rows
from tests.tiny_policies import plain_sample

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def sample(command, monkeypatch):
    """``kltune sample ...`` with something on stdin."""

    def call(*arguments: object, as_json: bool = True, stdin: io.StringIO | None = None):
        monkeypatch.setattr("sys.stdin", io.StringIO() if stdin is None else stdin)
        return command("sample", *arguments, as_json=as_json)

    return call


def said(document: dict, side: str) -> list[str]:
    return [pair[side]["response"] for entry in document["prompts"] for pair in entry["responses"]]


def test_the_reference_says_what_the_base_alone_says_with_these_numbers(sample, run_folder, llama):
    code, document, _ = sample(
        run_folder, "--prompt", "the ", "--prompt", "my cat", "--responses", 2, "--seed", 5, "--temperature", 1.3
    )
    assert code == 0
    assert document["schema"] == "kltune.sample/1"
    assert document["direction"] == {"policy": "KL(policy||reference)", "reference": "KL(reference||policy)"}
    assert [entry["prompt"] for entry in document["prompts"]] == ["the ", "my cat"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    asked = [tokenizer(text)["input_ids"] for text in ("the ", "the ", "my cat", "my cat")]
    prompts = [Prompt((0,), "", "")] * 2
    numbers = Round(prompts, 0, 2, 2).uniforms(Draw(document["max_new_tokens"], seed=5)).tolist()
    plain = [plain_sample(model, ids, row, [1], 1.3) for ids, row in zip(asked, numbers, strict=True)]
    assert said(document, "reference") == tokenizer.batch_decode(plain, skip_special_tokens=True)
    assert said(document, "policy") != said(document, "reference")
    for entry in document["prompts"]:
        for side in (side for pair in entry["responses"] for side in pair.values()):
            assert side["kl"] == pytest.approx(sum(side["token_kl"]), rel=1e-5)
            joined = "".join(side["tokens"])
            assert joined.replace("</s>", "").replace("<s>", "").replace("<pad>", "") == side["response"]


def test_prompts_come_from_a_pipe_or_a_file_alike(sample, run_folder, tmp_path):
    typed = sample(run_folder, "-p", "so", "-p", " if")[1]
    assert sample(run_folder, stdin=io.StringIO("so\n\n if\r\n"))[1] == typed
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": "so"}, {"prompt": " if"}])
    filed = sample(run_folder, "--prompts", tmp_path / "prompts.jsonl")[1]
    assert filed["prompts"] == typed["prompts"]


def test_a_conversation_at_a_terminal(sample, run_folder):
    code, out, err = sample(run_folder, as_json=False, stdin=Terminal("so\n\nso\n"))
    assert code == 0
    assert err.count("> ") == 4      # the fourth is where it ends
    assert out.count("prompt            so") == out.count("\npolicy ") == out.count("\nreference ") == 2
    first, second = out.split("prompt            so")[1:]
    assert first.strip() != second.strip()      # each turn has numbers of its own
    assert "\033" not in out
    code, document, err = sample(run_folder, stdin=Terminal("so\n"))
    assert "Type prompts" in err
    assert said(document, "policy") == said(sample(run_folder, "-p", "so")[1], "policy")


def test_colour_on_a_terminal_and_marks_elsewhere(sample, run_folder, monkeypatch):
    monkeypatch.setattr("kltune.report.text.MARKED", 0.05)  # so briefly trained a policy is never loud
    arguments = (run_folder, "-p", "the ", "--responses", 4, "--temperature", 1.5)
    assert "[0." in sample(*arguments, as_json=False)[1]
    monkeypatch.setattr("kltune.cli.sample.wants_colour", lambda stream: True)
    assert "\033[3" in sample(*arguments, as_json=False)[1]


@pytest.fixture
def chat_model(llama, tmp_path):
    """The random Llama as a model that was made elsewhere, with a chat template."""
    folder = shutil.copytree(llama, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def test_a_full_model_and_the_chat_template_of_what_is_typed(sample, chat_model):
    ask = (chat_model, "--reference", chat_model, "-p", "hi", "--max-new-tokens", 3)
    code, document, err = sample(*ask)
    assert code == 0
    assert "note: prompts go through the chat template" in err
    assert (document["template"], document["prompts"][0]["prompt"]) == ("chat", "hi")
    assert said(document, "policy") == said(document, "reference")
    assert document["prompts"][0]["responses"][0]["policy"]["kl"] == 0.0
    code, document, _ = sample(*ask, "--template", "none")
    assert (document["template"], document["prompts"][0]["prompt"]) == ("none", "hi")


@pytest.mark.parametrize(
    ("rows", "template", "wanted"),
    [
        ([{"prompt": "so"}], "auto", "none"),
        ([{"messages": [{"role": "user", "content": "so"}]}], "auto", "chat"),
        ([{"prompt": "so"}], "chat", "chat"),
        (None, "auto", "chat"),
        (None, "none", "none"),
    ],
)
def test_what_is_typed_is_treated_as_the_runs_own_prompts(chat_model, open_policy, tmp_path, rows, template, wanted):
    policy, source = open_policy(path=chat_model), tmp_path / "prompts.jsonl"
    if rows is not None:
        write_rows(source, rows)
    settings = Settings(str(source), DataSection(template=template))
    assert template_of_typed(policy, settings) == wanted


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
def test_what_is_cut_of_a_typed_prompt_is_said(sample, ppo_recipe, overlong):
    result = run_ppo(ppo_recipe("data.max_prompt_tokens=8", f"data.on_overlong={overlong}", "run.steps=1"), False)
    code, document, err = sample(result["output"], "-p", "so", "-p", "what if she ran")
    assert (code, len(document["prompts"])) == (0, 2)
    assert "note: of 1 of 2 prompts only the last 8 tokens are read" in err
    assert "note: of" not in sample(result["output"], "-p", "so")[2]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "no prompt: give --prompt TEXT"),
        (("-p", "so", "--prompts", "a.jsonl"), 2, "found both"),
        (("--prompts", "nowhere.jsonl"), 5, "nowhere.jsonl does not exist"),
        (("-p", "so", "--template", "chat"), 5, "no chat template"),
        (("-p", "so", "--responses", "0"), 2, "--responses"),
    ],
)
def test_what_cannot_be_asked(sample, run_folder, arguments, code, words):
    found, document, err = sample(run_folder, *arguments)
    assert (found, document) == (code, "")
    assert words in err
    assert "Traceback" not in err


def test_a_checkpoint_that_is_not_there(sample, tmp_path):
    assert sample(tmp_path / "none", "-p", "so")[0] == 5
