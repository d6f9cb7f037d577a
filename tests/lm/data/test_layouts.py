"""Rows as others keep them become rows in our forms, and every change is said; what cannot be read says the way on."""

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

from kltune.errors import DataError
from kltune.lm.data.examples import load_examples, load_prompts
from kltune.lm.data.layouts import is_transcript, turns
from kltune.lm.data.pairs import load_comparisons, load_labelled, load_pairs
from kltune.lm.data.rows import RowFault
from tests.lm.data.test_data import (
    CHAT_TOKENIZER,
    LETTER_TOKENIZER,
    conversation,
    ids_of,
    letter_tokenizer,
    rules,
    write,
)

PAIR = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e"}
HH = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "hh-harmless" / "raw.jsonl"


def test_columns_have_the_names_that_a_recipe_gives_them(tmp_path):
    source = write(tmp_path, [{"question": "a", "answer": "b", "id": 3}])
    named = rules(columns={"prompt": "question", "response": "answer"})
    (example,), _ = load_examples(str(source), LETTER_TOKENIZER, named)
    assert example.ids[1:-1] == ids_of("ab")
    plain = write(tmp_path, [{"prompt": "c"}], "held_out.jsonl")       # has our name already
    assert load_prompts(str(plain), LETTER_TOKENIZER, named)[0][0].text == "c"
    with pytest.raises(DataError, match=r'data\.columns: wanted "query", found "question", "answer"'):
        load_prompts(str(source), LETTER_TOKENIZER, rules(columns={"prompt": "query"}))


def test_columns_under_other_names_are_refused_with_the_line_to_write(tmp_path):
    source = write(tmp_path, [{"question": "a", "answer": "b"}])
    with pytest.raises(DataError, match=r"name the columns, as data.columns: \{prompt: question, response: answer\}"):
        load_examples(str(source), LETTER_TOKENIZER, rules())


@pytest.mark.parametrize(("row", "load", "columns"), [
    ({"prompt": "a", "completion": "b"}, load_examples, "{response: completion}"),
    ({"question": "a", "response": "b"}, load_examples, "{prompt: question}"),
    ({"prompt": "a", "completion": "b", "label": True}, load_comparisons, "{response: completion}"),
    ({"prompt": "a", "completion": "b", "label": True}, load_labelled, "{response: completion}"),
    ({"prompt": "a", "winner": "b", "loser": "c"}, load_comparisons, "{chosen: winner, rejected: loser}"),
    ({"question": "a", "chosen": "b", "rejected": "c"}, load_pairs, "{prompt: question}"),
    ({"system_prompt": "e", "question": "a", "response": "b"}, load_examples, "{prompt: question}"),
])
def test_one_column_under_another_name_is_refused_with_the_line_to_write(tmp_path, row, load, columns):
    source = str(write(tmp_path, [row]))
    with pytest.raises(DataError, match=re.escape(f"name the columns, as data.columns: {columns}")):
        load(source, CHAT_TOKENIZER, rules())
    rows, _ = load(source, CHAT_TOKENIZER, rules(columns=yaml.safe_load(columns)))
    assert len(rows) == 1


def test_a_header_with_blanks_in_it_is_refused_with_names_that_a_recipe_can_hold(tmp_path):
    source = str(write(tmp_path, "prompt, response\na,b\n", "rows.csv"))
    with pytest.raises(DataError, match=r'data\.columns: \{response: " response"\}'):
        load_examples(source, LETTER_TOKENIZER, rules())
    assert len(load_examples(source, LETTER_TOKENIZER, rules(columns={"response": " response"}))[0]) == 1


@pytest.mark.parametrize("row", [
    {"prompt": "a", "response": "b"}, conversation("user: a", "assistant: b"),
    {"instruction": "a", "output": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"},
])
def test_a_file_that_has_our_names_needs_none_of_the_columns(tmp_path, row):
    columns = {"label": "liked"} if "chosen" in row else {"text": "story"}
    load = load_pairs if "chosen" in row else load_examples
    source = str(write(tmp_path, [row]))
    assert load(source, CHAT_TOKENIZER, rules(columns=columns))[0] == load(source, CHAT_TOKENIZER, rules())[0]
    held_out = str(write(tmp_path, [{"prompt": "a"}], "held_out.jsonl"))
    assert len(load_prompts(held_out, CHAT_TOKENIZER, rules(columns={"response": "completion"}))[0]) == 1


@pytest.mark.parametrize(("row", "columns"), [
    ({"instruction": "a", "input": "b", "output": "c"}, {}),
    ({"instruction": "a", "context": "b", "response": "c"}, {}),
    ({"question": "a\n\nb", "answer": "c"}, {"prompt": "question", "response": "answer"}),
])
def test_a_text_beside_what_became_prompt_and_response_is_not_learnt(tmp_path, row, columns):
    told = str(write(tmp_path, [{"prompt": "a\n\nb", "response": "c"}], "told.jsonl"))
    source = str(write(tmp_path, [row | {"text": "what it asks and says in one"}]))
    mine, theirs = (load_examples(one, LETTER_TOKENIZER, rules(columns=columns))[0] for one in (told, source))
    assert (theirs[0].ids, theirs[0].scored) == (mine[0].ids, mine[0].scored)


def test_of_two_forms_in_one_row_the_line_says_which_is_read(tmp_path):
    row = {"text": "a", "prompt": "b", "response": "c"}
    (example,), counts = load_examples(str(write(tmp_path, [row])), LETTER_TOKENIZER, rules())
    assert example.ids[1:-1] == ids_of("a")
    assert counts.notes == ('rows are read as "text", not as "prompt", "response", which they have too',)


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"conversations": conversation("user: a", "assistant: b")["messages"]},
    {"messages": json.dumps(conversation("user: a", "assistant: b")["messages"])},
    {"conversations": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])},
])
def test_conversations_are_the_messages_that_they_hold(tmp_path, row):
    mine, _ = load_examples(str(write(tmp_path, [conversation("user: a", "assistant: b")])), CHAT_TOKENIZER, rules())
    theirs, counts = load_examples(str(write(tmp_path, [row], "theirs.jsonl")), CHAT_TOKENIZER, rules())
    assert [(one.ids, one.scored) for one in theirs] == [(one.ids, one.scored) for one in mine]
    assert counts.notes


@pytest.mark.parametrize(("row", "words"), [
    ({"conversations": [{"from": "narrator", "value": "a"}]}, '"narrator", wanted system, user'),
    ({"messages": "[{'role': 'user', 'content': 'a'}]"}, "no JSON; wanted a list of messages, or one that json.dumps"),
    ({"messages": [{"role": "human", "content": "a"}]}, '"human", wanted system, user'),
])
def test_a_conversation_that_nobody_can_read_is_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        load_prompts(str(write(tmp_path, [row])), CHAT_TOKENIZER, rules())


def test_an_instruction_is_a_prompt_with_its_input_behind_it(tmp_path):
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}]
    examples, counts = load_examples(str(write(tmp_path, rows)), LETTER_TOKENIZER, rules())
    assert [one.ids[1:-1] for one in examples] == [ids_of("a\n\nbc"), ids_of("de")]
    assert counts.notes == ('"instruction" and "input" are the prompt, "output" is the response (Alpaca)',)
    dolly = {"instruction": "a", "context": "b", "response": "c", "category": "d"}
    (example,), counts = load_examples(str(write(tmp_path, [dolly])), LETTER_TOKENIZER, rules())
    assert example.ids[1:-1] == ids_of("a\n\nbc")
    assert counts.notes == ('"instruction" and "context" are the prompt, "response" is the response (Dolly)',)
    with pytest.raises(DataError, match='field "input": found the number 7'):
        load_examples(str(write(tmp_path, [rows[0] | {"input": 7}])), LETTER_TOKENIZER, rules())


ASKED = conversation("system: e", "user: c", "assistant: d", "user: a")["messages"]
ANSWER = {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(("row", "columns", "asked"), [
    ({"system": "e", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, {},
     [ASKED[0], ASKED[3]]),
    ({"system_prompt": "e", "question": "a", "response": "b"}, {"prompt": "question"}, [ASKED[0], ASKED[3]]),
    ({"system": "e", "instruction": "a", "output": "b", "history": [["c", "d"]]}, {}, ASKED),
    ({"system": "e", "instruction": "a", "output": "b", "history": '[["c", "d"]]'}, {}, ASKED),
    ({"system": "", "history": [], "prompt": "a", "response": "b"}, {}, ASKED[3:]),
    ({"system": "e", "messages": [*ASKED, ANSWER]}, {}, ASKED),
    ({"history": [["c", "d"]], "messages": [ASKED[0], ASKED[3], ANSWER]}, {}, ASKED),
    ({"prompt": ASKED, "response": [ANSWER]}, {}, ASKED),
    ({"prompt": ASKED, "completion": [ANSWER]}, {"response": "completion"}, ASKED),
    ({"prompt": json.dumps(ASKED), "response": json.dumps([ANSWER])}, {}, ASKED),
    ({"prompt": ASKED, "response": "b"}, {}, ASKED),
    ({"prompt": "a", "response": [ANSWER]}, {}, ASKED[3:]),
])
def test_what_stands_beside_a_prompt_is_asked_as_well_and_the_response_is_learnt(tmp_path, row, columns, asked):
    (example,), _ = load_examples(
        str(write(tmp_path, [row])), CHAT_TOKENIZER, rules(columns=columns, turns="last"))
    written = CHAT_TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    start = example.scored.index(True)
    assert (example.ids[:start], example.ids[start:]) == (tuple(written), (*ids_of("b"), 1))
    if "messages" not in row:       # of a prompt nothing is learnt, also where it holds answers
        assert load_examples(str(write(tmp_path, [row])), CHAT_TOKENIZER, rules(columns=columns))[0] == [example]


@pytest.mark.parametrize("sides", [
    {"chosen": "b", "rejected": "f"}, {"chosen": [ANSWER], "rejected": [ANSWER | {"content": "f"}]},
    {"chosen": [ASKED[3], ANSWER], "rejected": [ASKED[3], ANSWER | {"content": "f"}]},
])
def test_a_system_prompt_of_a_pair_is_asked(tmp_path, sides):
    rows = [{"system": "", "question": "a"} | sides, {"system": "e", "question": "a"} | sides]
    pairs, counts = load_pairs(str(write(tmp_path, rows)), CHAT_TOKENIZER, rules(columns={"prompt": "question"}))
    wanted = [CHAT_TOKENIZER.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
              for asked in (ASKED[3:], [ASKED[0], ASKED[3]])]
    assert [list(pair.prompt.ids) for pair in pairs] == wanted
    assert '"system" is the system message' in counts.notes


@pytest.mark.parametrize(("more", "words"), [
    ({"functions": [{"name": "f"}]}, 'field "functions": descriptions of tools'),
    ({"tools": '[{"name": "f"}]'}, 'field "tools": descriptions of tools'),
    ({"chat_template_kwargs": {"thinking": False}}, 'field "chat_template_kwargs": what the chat template is told'),
    ({"images": ["a.png"]}, 'field "images": kltune trains on text alone'),
    ({"history": [["a"]]}, 'field "history": found a list, wanted a list of [question, answer]'),
    ({"history": "a"}, 'field "history": found the text \'a\', wanted a list'),
    ({"system": {"a": 1}}, 'field "system": found an object'),
    ({"system": "a", "system_prompt": "b"}, 'fields "system" and "system_prompt": two system prompts'),
])
@pytest.mark.parametrize("row", [{"prompt": "a", "response": "b"}, conversation("user: a", "assistant: b")])
def test_what_cannot_be_asked_as_well_is_a_faulty_row(tmp_path, row, more, words):
    with pytest.raises(DataError, match=re.escape(words)):
        load_examples(str(write(tmp_path, [row | more])), CHAT_TOKENIZER, rules())
    blank = {"tools": "[]", "functions": [], "chat_template_kwargs": "{}", "history": None, "images": None}
    plain, full = (load_examples(str(write(tmp_path, [one])), CHAT_TOKENIZER, rules())[0] for one in (row, row | blank))
    assert full == plain


@pytest.mark.parametrize(("rows", "changes", "words"), [
    ([{"system": "e", "prompt": "a"}], {"template": "none"}, 'field "system": plain text has no place for it; wanted'),
    ([{"prompt": "a"}, {"system": "e", "prompt": "a"}], {}, 'rows.jsonl:2: field "system": found some, but none in'),
    ([{"system": "e", "messages": [ASKED[0] | {"content": "g"}, ASKED[3]]}], {}, '"messages[0]": another system mess'),
    ([{"system": "e", "prompt": "Human: a\n\nAssistant:"}], {"transcripts": "text"}, "write it into the text"),
])
def test_a_system_prompt_without_a_place_is_a_faulty_row(tmp_path, rows, changes, words):
    with pytest.raises(DataError, match=re.escape(words)):
        load_prompts(str(write(tmp_path, rows)), CHAT_TOKENIZER, rules(**changes))


def test_a_system_prompt_is_refused_where_no_template_can_write_it_and_an_empty_one_is_none(tmp_path):
    with pytest.raises(DataError, match="plain text has no place for it; wanted a chat template"):
        load_prompts(str(write(tmp_path, [{"system": "e", "prompt": "a"}])), LETTER_TOKENIZER, rules())
    prompts, _ = load_prompts(str(write(tmp_path, [{"system": "", "prompt": "a"}])), LETTER_TOKENIZER, rules())
    assert prompts[0].messages == ()
    mixed = str(write(tmp_path, [{"prompt": "a"}, {"system": "e", "prompt": "a"}]))
    assert len(load_prompts(mixed, CHAT_TOKENIZER, rules(template="chat"))[0]) == 2     # messages, all of them


@pytest.mark.parametrize("weight", [0, 0.0, False])
def test_an_answer_of_weight_0_is_read_and_not_learnt(tmp_path, weight):
    told = conversation("user: a", "assistant: b", "user: c", "assistant: d")
    learnt, _ = load_examples(str(write(tmp_path, [told])), CHAT_TOKENIZER, rules())
    for place, others in ((1, "d"), (3, "b")):
        messages = [message | ({"weight": weight if at == place else 1} if at % 2 else {})
                    for at, message in enumerate(told["messages"])]
        (example,), _ = load_examples(str(write(tmp_path, [{"messages": messages}])), CHAT_TOKENIZER, rules())
        assert example.ids == learnt[0].ids[: len(example.ids)]
        assert [i for i, s in zip(example.ids, example.scored, strict=True) if s] == [*ids_of(others), 1]
    for weights, words in ((weight, "with a weight that is not 0"), (0.5, "found the number 0.5, wanted 0 or 1")):
        row = {"messages": [told["messages"][0], told["messages"][1] | {"weight": weights}]}
        with pytest.raises(DataError, match=words):
            load_examples(str(write(tmp_path, [row])), CHAT_TOKENIZER, rules())


def test_sides_that_are_one_message_are_answers(tmp_path):
    said = {side: {"from": "gpt", "value": text} for side, text in (("chosen", "b"), ("rejected", "c"))}
    row = {"conversations": [{"from": "human", "value": "a"}], **said}
    (pair,), _ = load_pairs(str(write(tmp_path, [row])), CHAT_TOKENIZER, rules())
    assert (pair.prompt.text, pair.chosen.text, pair.rejected.text) == ("a", "b", "c")


def test_lines_of_a_text_file_are_prompts_or_texts(tmp_path):
    source = str(write(tmp_path, "a b\n\n c\r\n", "rows.txt"))
    prompts, counts = load_prompts(source, LETTER_TOKENIZER, rules())
    assert [(prompt.text, prompt.where) for prompt in prompts] == [("a b", "rows.txt:1"), (" c", "rows.txt:3")]
    assert counts.notes == ("one prompt or text a line",)
    assert len(load_examples(source, LETTER_TOKENIZER, rules())[0]) == 2
    with pytest.raises(DataError, match='field "chosen": missing'):
        load_pairs(source, LETTER_TOKENIZER, rules())


@pytest.mark.parametrize(("separator", "name"), [(";", "a semicolon"), ("\t", "a tab"), ("|", "a vertical bar")])
def test_the_separator_of_a_table_is_found_and_named(tmp_path, separator, name):
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows([["prompt", "response"], ["a, b", f"c{separator}\nd"]])
    (example,), counts = load_examples(str(path), LETTER_TOKENIZER, rules())
    assert counts.notes == (f"columns are separated by {name}",)
    assert len(example.ids) == 2 + len(f"a, bc{separator}\nd")


def test_transcripts_are_messages_where_a_template_can_write_them(tmp_path):
    source = str(write(tmp_path, [PAIR]))
    (pair,), counts = load_pairs(source, CHAT_TOKENIZER, rules())
    asked = conversation("user: a", "assistant: b", "user: c")["messages"]
    (wanted,), _ = load_pairs(str(write(tmp_path, [{
        "prompt": asked, "chosen": "d", "rejected": "e"}], "messages.jsonl")), CHAT_TOKENIZER, rules())
    assert (pair.prompt.ids, pair.chosen.ids, pair.rejected.ids) == (
        wanted.prompt.ids, wanted.chosen.ids, wanted.rejected.ids)
    rendered = CHAT_TOKENIZER.apply_chat_template([*asked, {"role": "assistant", "content": "d"}], tokenize=False)
    assert counts.notes[0].startswith(f"transcripts are read as messages, the first of them as {rendered!r}")
    (kept,), counts = load_pairs(source, CHAT_TOKENIZER, rules(transcripts="text"))
    assert kept.prompt.text == PAIR["chosen"][:-2]
    assert counts.notes == ()
    assert load_pairs(source, LETTER_TOKENIZER, rules())[0] == load_pairs(
        source, LETTER_TOKENIZER, rules(transcripts="text"))[0]     # no template, nothing to write them


def test_prompts_and_texts_are_transcripts_too(tmp_path):
    prompts, _ = load_prompts(str(write(tmp_path, [{"prompt": "Human: a\n\nAssistant:"}])), CHAT_TOKENIZER, rules())
    assert prompts[0].messages == tuple(conversation("user: a")["messages"])
    texts, _ = load_examples(str(write(tmp_path, [{"text": PAIR["chosen"]}])), CHAT_TOKENIZER, rules())
    assert sum(texts[0].scored) == 4        # two answers, an end token each


@pytest.mark.parametrize(("text", "words"), [
    ("\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "Assistant speaks twice in a row.*data.transcripts: text"),
    ("\n\nHuman: a\n\nAssistant:", "a turn of the assistant is empty"),
])
def test_a_transcript_out_of_turn_is_a_faulty_row(text, words):
    assert is_transcript(text)
    with pytest.raises(RowFault, match=words):
        turns(text, "chosen")


def test_a_generation_prompt_that_ends_in_a_space_is_named(tmp_path):
    spaced = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    source = str(write(tmp_path, [conversation("user: a", "assistant: b")]))
    tokenizer = letter_tokenizer(template=spaced + "{% if add_generation_prompt %} {% endif %}")
    with pytest.raises(DataError, match="the generation prompt of the chat template ends in ' ', which it leaves out"):
        load_examples(source, tokenizer, rules())
    asked = str(write(tmp_path, [conversation("user: a")], "asked.jsonl"))
    assert "ends in a space" in load_prompts(asked, tokenizer, rules())[1].notes[0]
    assert not any("space" in note for note in load_prompts(asked, CHAT_TOKENIZER, rules())[1].notes)


def test_a_text_that_only_mentions_speakers_is_none():
    assert not any(map(is_transcript, ("a Human: b", "Human: alone", "He said:\n\nAssistant: x", 7)))


@pytest.mark.skipif(not HH.exists(), reason="../shared/data/hh-harmless, beside the repository, is not here")
def test_the_transcripts_of_hh_are_read_but_for_the_few_that_are_no_conversation():
    faulty = 0
    for line in HH.read_text(encoding="utf-8").splitlines():
        try:
            chosen, rejected = (turns(json.loads(line)[side], side) for side in ("chosen", "rejected"))
            faulty += chosen[:-1] != rejected[:-1]
        except RowFault:
            faulty += 1
    assert 0 < faulty <= 15         # of 1,500: 1 % is what on_bad_row: skip leaves out
