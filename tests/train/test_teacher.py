"""What a teacher is asked: templates with a row's fields, in plain prompts and in conversations."""

import pytest

from kltune.errors import DataError
from kltune.lm.data.examples import Prompt, RowRules, load_prompts
from kltune.lm.data.rows import Row, RowFault
from kltune.recipe import DistillSection
from kltune.train.teacher import filled, told
from tests.stages.conftest import letter_tokenizer

CHAT = (
    "{% for m in messages %}{{ m.role[0] }} {{ m.content }}.{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
TURNS = [
    {"role": "system", "content": "be odd"}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "who is it"},
]


class Asking:
    """What ``told`` needs of a policy."""

    tokenizer = letter_tokenizer()


def asked(row: dict, limit: int = 64, chat: str | None = None, **keys: str) -> str:
    """The letters that the teacher reads in the place of a row's prompt."""
    Asking.tokenizer.chat_template = chat
    rules = RowRules(limit, limit, end_token=1)
    prompts, _ = load_prompts("rows", Asking.tokenizer, rules, [Row("rows:1", row)])
    (prompt,) = told(prompts, DistillSection(teacher="reference", **keys), Asking, rules)
    assert prompt.text == prompts[0].text       # the policy is asked as ever
    assert prompt.ids == prompts[0].ids
    return Asking.tokenizer.decode(prompt.for_teacher, skip_special_tokens=True)


def test_a_plain_prompt_is_put_in_the_template_with_its_row():
    found = asked({"prompt": "who", "hint": "a cat", "n": 3}, teacher_prompt="{hint} and {{}} {prompt}")
    assert found == "a cat and .. who"      # no braces in a tokenizer of letters


def test_of_a_conversation_the_last_message_is_replaced_and_the_system_is_the_teachers_own():
    assert asked({"messages": TURNS}, chat=CHAT, teacher_prompt="oh {prompt}") == "s be odd.u hi.a yo.u oh who is it.a "
    found = asked({"messages": TURNS, "answer": "me"}, chat=CHAT, teacher_system="it is {answer}")
    assert found == "s it is me.u hi.a yo.u who is it.a "
    assert asked({"messages": TURNS[1:2]}, chat=CHAT, teacher_system="be kind") == "s be kind.u hi.a "


@pytest.mark.parametrize(("row", "keys", "said"), [
    ({"prompt": "who"}, {"teacher_prompt": "{hint} {prompt}"}, "no field 'hint'.*it has prompt"),
    ({"prompt": "who", "hint": ["a"]}, {"teacher_prompt": "{hint}"}, "found a list, wanted text or a number"),
    ({"prompt": "who"}, {"teacher_system": "be kind"}, "only a chat template has a system message"),
    ({"prompt": "who"}, {"teacher_prompt": "a" * 40 + "{prompt}"}, "has 44 tokens, wanted at most 20"),
])
def test_a_row_that_cannot_be_asked_is_named(row, keys, said):
    with pytest.raises(DataError, match=rf"rows:1: distill\.teacher_prompt: .*{said}"):
        asked(row, limit=20, **keys)


def test_without_a_template_nothing_is_told():
    prompts = [Prompt((0, 5), "who", "rows:1")]
    assert told(prompts, DistillSection(teacher="runs/x"), Asking, None) == prompts


def test_a_template_is_text_and_no_code():
    with pytest.raises(RowFault):
        filled("{prompt.__class__}", {"prompt": "who"})
    assert filled("{a}{b}", {"a": "{b}", "b": 2.5}) == "{b}2.5"
