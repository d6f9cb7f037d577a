"""Prompts that are conversations, a system message and several turns, in every stage and before every scorer."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from kltune.errors import ScorerError
from tests.judges import Endpoint, part, serving
from tests.stages.conftest import ran, read_jsonl, write_rows
from tests.stages.test_inputs import CHAT

ROLES = ["system", "user", "assistant", "user"]
FUNCTIONS = '''
ROLES = ["system", "user", "assistant", "user"]

def right(prompts, responses, rows):
    """Whether a response has the answer of its row in it; of prompts that are the messages of that row."""
    for asked, row in zip(prompts, rows, strict=True):
        assert [message["role"] for message in asked] == ROLES, asked
        assert asked == row["messages"], (asked, row)
        asked.clear()       # whatever a function does to what it was given
    return [float(response.count(row["answer"])) for response, row in zip(responses, rows, strict=True)]

def told(prompts, responses, rows):
    """Without being asked for messages, the prompts are text."""
    for asked, row in zip(prompts, rows, strict=True):
        assert asked == "\\n\\n".join(f"{m['role']}: {m['content']}" for m in row["messages"]), asked
    return [float(len(response)) for response in responses]
'''


def conversation(text: str) -> dict[str, Any]:
    """A row: what is to be answered comes last, and the reference answer beside it."""
    said = zip(ROLES, ("be kind", "hi", "oh", text), strict=True)
    return {"messages": [{"role": role, "content": content} for role, content in said], "answer": "a"}


def judge(_: int, question: str) -> str:
    """A judge who reads the conversation, and speaks only if it is whole; more a's are better."""
    lines = part(question, "prompt, a conversation").split("\n")
    messages = [json.loads(line) for line in lines]
    assert [message["role"] for message in messages] == ROLES
    assert messages[0]["content"] == "be kind"
    if "[response]" in question:
        return json.dumps({"score": min(10, part(question, "response").count("a"))})
    counts = [part(question, f"response {name}").count("a") for name in "AB"]
    return json.dumps({"better": "tie" if counts[0] == counts[1] else "AB"[counts[1] > counts[0]]})


@pytest.fixture(name="endpoint")
def _endpoint() -> Iterator[Endpoint]:
    with serving(judge) as endpoint:
        yield endpoint


@pytest.fixture(name="talk")
def _talk(request, tmp_path, endpoint):
    """From a stage's fixture and overrides to a recipe whose prompts are conversations."""

    def make(name: str, *overrides: str, **rewards: Any):
        build = request.getfixturevalue(name)
        folder = tmp_path / name.removesuffix("_recipe")
        (folder / "chat.jinja").write_text(CHAT)
        (folder / "rewards.py").write_text(FUNCTIONS)
        for file in ("prompts", "held_out"):
            rows = read_jsonl(folder / f"{file}.jsonl")
            write_rows(folder / f"{file}.jsonl", [conversation(row["prompt"]) for row in rows])
        if name == "sft_recipe":
            rows = [conversation(row["prompt"])["messages"] + [{"role": "assistant", "content": row["response"]}]
                    for row in read_jsonl(folder / "texts.jsonl")]
            write_rows(folder / "texts.jsonl", [{"messages": row} for row in rows])
        more = {"eval.texts": None} if name == "sft_recipe" else {}
        keys = rewards | more | {"data.chat_template": "chat.jinja", "run.steps": 2}
        return build(*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides)

    return make


def asked_by(endpoint: Endpoint, mode: str) -> dict[str, Any]:
    """The endpoint as an entry of a recipe."""
    return {"kind": "judge", "url": endpoint.url, "model": "m", "mode": mode, "input": "messages"}


RIGHT = {"kind": "function", "path": "rewards.py:right", "input": "messages"}
TOLD = {"kind": "function", "path": "rewards.py:told", "weight": 0.01}


@pytest.mark.parametrize("name", ["sft_recipe", "ppo_recipe", "trpo_recipe", "online_recipe", "distill_recipe"])
def test_a_conversation_reaches_function_and_judge_whole_in_every_stage(talk, endpoint, name):
    """As messages with their roles, with the row's reference answer; and as text where messages are not asked for."""
    rewards: dict[str, Any] = {"eval.gold": RIGHT, "eval.judge": asked_by(endpoint, "pair")}
    if name in ("ppo_recipe", "trpo_recipe"):
        rewards["reward"] = [TOLD, {**RIGHT, "weight": 0.5}, asked_by(endpoint, "score")]
        rewards["eval.gold"] = asked_by(endpoint, "score") | {"rubric": "Be strict."}
    if name == "online_recipe":
        rewards["reward"] = [asked_by(endpoint, "pair")]
    if name == "distill_recipe":
        rewards["distill.teacher_prompt"] = "a a {prompt} {answer}"
    result, _ = ran(talk(name, **rewards))
    assert result["gold"] is not None
    low, high = result["win_rate_ci95"]
    assert 0.0 <= low <= result["win_rate"] <= high <= 1.0
    assert endpoint.asked


def test_a_judge_that_was_asked_for_messages_is_recorded_so(talk, endpoint):
    recipe = talk("ppo_recipe", reward=[asked_by(endpoint, "score")])
    ran(recipe)
    record = json.loads((recipe.folder / "run" / "run.json").read_text())
    assert record["rewards"][0]["input"] == "messages"


def test_without_the_key_the_function_gets_text(talk):
    with pytest.raises(ScorerError, match="right"):
        ran(talk("ppo_recipe", reward=[RIGHT | {"input": "text"}]))


def test_a_reward_model_of_conversations_reads_the_tokens_that_were_sampled(talk, tmp_path, capsys):
    """Trained on whole conversations, it scores a response behind all that was said before it, system included."""
    trained = talk("reward_recipe")
    rows = read_jsonl(tmp_path / "reward" / "judged.jsonl")
    pairs = [{**conversation(row["prompt"]), "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    write_rows(tmp_path / "reward" / "judged.jsonl", pairs)
    final = ran(trained)[0]["final"]
    capsys.readouterr()
    result, _ = ran(talk("ppo_recipe", reward=[{"kind": "model", "path": final}]))
    assert "reads the policy's own tokens, as '<s>be kind</s>hi .oh</s>the  .RESPONSE'" in capsys.readouterr().err
    assert result["score"] is not None
