"""Reading of prompts and texts: every wrong row is named with its place, every good one becomes the right tokens."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kltune.errors import DataError
from kltune.lm.data.examples import Counts, Example, Prompt, RowRules, load_examples, load_prompts, shuffled_positions

SPECIAL = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
BOS, END, USER, ASSISTANT = 0, 1, 3, 4
LETTERS = "abcdefghijklmnopqrstuvwxyz .\nABCDEFGH"      # a letter is a token: a = 6, b = 7, ...

# Like the templates in use: a header and </s> around each message; an answer begins after the assistant's header.
TEMPLATE = (
    "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
STORIES = SHARED / "data" / "stories"
STORIES_MODEL = SHARED / "models" / "stories260K"
needs_stories = pytest.mark.skipif(
    not (STORIES.is_dir() and STORIES_MODEL.is_dir()), reason="shared/ with the stories data and tokenizer is not here"
)


def letter_tokenizer(around: str = "<s> $A", template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a letter; ``around`` is what the post-processor puts around a text."""
    vocabulary = {text: index for index, text in enumerate([*SPECIAL, *LETTERS])}
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters.decoder = decoders.Fuse()
    letters.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    special = [(text, letters.token_to_id(text)) for text in ("<s>", "</s>") if text in around]
    letters.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


LETTER_TOKENIZER = letter_tokenizer()
CHAT_TOKENIZER = letter_tokenizer(template=TEMPLATE)


def ids_of(text: str) -> tuple[int, ...]:
    return tuple(len(SPECIAL) + LETTERS.index(letter) for letter in text)


def rules(**changes) -> RowRules:
    return replace(RowRules(100, 100, END, "auto", "error", "error"), **changes)


def prompts_of(source, tokenizer=LETTER_TOKENIZER, **changes) -> tuple[list[Prompt], Counts]:
    return load_prompts(str(source), tokenizer, rules(**changes))


def examples_of(source, tokenizer=LETTER_TOKENIZER, **changes) -> tuple[list[Example], Counts]:
    return load_examples(str(source), tokenizer, rules(**changes))


def write(folder: Path, content: str | bytes | list, name: str = "rows.jsonl") -> Path:
    """A data file; a list is written as one JSON object a line."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def conversation(*turns: str) -> dict[str, list[dict[str, str]]]:
    """Messages from ``"user: hello"``, ``"assistant: hi"``."""
    return {"messages": [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]}


def refusal(read, source, **changes) -> str:
    with pytest.raises(DataError) as caught:
        read(source, **changes)
    assert caught.value.exit_code == 5
    return str(caught.value)


# ---- wrong rows -------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "a"}\n'
TOLD = '{"prompt": "a", "response": "b"}\n'
EMPTY_ROLE = '{"messages": [{"role": "user", "content": ""}]}\n'

WRONG_PROMPTS = {
    "null": (GOOD + '{"prompt": null}\n', 'rows.jsonl:2: field "prompt": found null, wanted non-empty text'),
    "empty": (GOOD * 2 + '{"prompt": ""}\n', 'rows.jsonl:3: field "prompt": found empty text'),
    "white space": ('{"prompt": " \\n "}\n', 'rows.jsonl:1: field "prompt": found only white space'),
    "number": ('{"prompt": 7}\n', 'rows.jsonl:1: field "prompt": found the number 7'),
    "boolean": ('{"prompt": true}\n', 'rows.jsonl:1: field "prompt": found true'),
    "list": ('{"prompt": ["a"]}\n', "rows.jsonl:1: field \"prompt[0]\": found the text 'a', wanted {"),
    "other fields": (GOOD + '{"question": "a"}\n', 'rows.jsonl:2: field "prompt": missing'),
    "no known field": (
        '{"question": "a"}\n', 'rows.jsonl:1: wanted "prompt" or "messages" or "chosen", "rejected", found "question"',
    ),
    "empty object": ("{}\n", "rows.jsonl:1: wanted"),
    "after blank lines": ("\n \n" + GOOD + '\n{"prompt": 1}\n', 'rows.jsonl:5: field "prompt": found the number 1'),
    "escaped NUL": ('{"prompt": "a\\u0000"}\n', 'rows.jsonl:1: field "prompt": found a NUL character at character 2'),
    "lone surrogate": ('{"prompt": "\\ud83d"}\n', 'rows.jsonl:1: field "prompt": found half of a surrogate pair'),
    "messages null": ('{"messages": null}\n', 'rows.jsonl:1: field "messages": found null, wanted a list'),
    "messages text": ('{"messages": "a"}\n', "rows.jsonl:1: field \"messages\": found the text 'a', wanted a list"),
    "messages empty": ('{"messages": []}\n', 'rows.jsonl:1: field "messages": found an empty list'),
    "message text": ('{"messages": ["a"]}\n', "rows.jsonl:1: field \"messages[0]\": found the text 'a'"),
    "content empty": (EMPTY_ROLE, 'rows.jsonl:1: field "messages[0].content": found empty text'),
    "role missing": ('{"messages": [{"content": "a"}]}\n', 'rows.jsonl:1: field "messages[0].role": missing'),
    "role unknown": ([conversation("human: a")], 'field "messages[0].role": found "human", wanted system, user, assis'),
    "role order": ([conversation("user: a", "user: b")], 'field "messages[1].role": found user after user'),
    "role first": ([conversation("assistant: a", "user: b")], "found assistant as the first role, wanted system or us"),
    "system late": ([conversation("user: a", "system: b")], "found system after user, wanted assistant"),
    "answered": ([conversation("user: a", "assistant: b")], "found assistant in the last message of a prompt"),
    "mixed": ([{"prompt": "a"}, {"prompt": "b"}, conversation("user: c")], 'rows.jsonl:3: found a row with "messages"'),
}


@pytest.mark.parametrize(("content", "words"), WRONG_PROMPTS.values(), ids=WRONG_PROMPTS.keys())
def test_a_wrong_prompt_is_named_with_its_line_and_field(tmp_path, content, words):
    message = refusal(prompts_of, write(tmp_path, content), tokenizer=CHAT_TOKENIZER)
    assert words in message
    assert "1 faulty row in" in message


WRONG_TEXTS = {
    "text null": ('{"text": null}\n', 'rows.jsonl:1: field "text": found null'),
    "text empty": ('{"text": "a"}\n{"text": ""}\n', 'rows.jsonl:2: field "text": found empty text'),
    "response missing": (TOLD + '{"prompt": "a"}\n', 'rows.jsonl:2: field "response": missing'),
    "response missing first": ('{"prompt": "a"}\n', 'rows.jsonl:1: field "response": missing'),
    "response empty": (TOLD + '{"prompt": "a", "response": ""}\n', 'rows.jsonl:2: field "response": found empty text'),
    "prompt null": ('{"prompt": null, "response": "b"}\n', 'rows.jsonl:1: field "prompt": found null'),
    "no assistant": ([conversation("system: a", "user: b")], "found no message of the assistant"),
    "assistant null": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}\n',
        'rows.jsonl:1: field "messages[1].content": found null',
    ),
    "tool first": ([conversation("tool: a", "assistant: b")], "found tool as the first role"),
    "mixed": ([{"text": "a"}, {"prompt": "a", "response": "b"}], 'rows.jsonl:2: found a row with "prompt", "response"'),
}


@pytest.mark.parametrize(("content", "words"), WRONG_TEXTS.values(), ids=WRONG_TEXTS.keys())
def test_a_wrong_text_is_named_with_its_line_and_field(tmp_path, content, words):
    assert words in refusal(examples_of, write(tmp_path, content), tokenizer=CHAT_TOKENIZER)


def test_rows_that_cannot_be_read_are_faults_like_the_others(tmp_path):
    message = refusal(prompts_of, write(tmp_path, '{"prompt": ""}\n{"prompt": \n' + GOOD))
    assert "2 faulty rows in 3 read" in message
    assert 'rows.jsonl:1: field "prompt": found empty text' in message
    assert "rows.jsonl:2: not JSON" in message


def test_csv_and_parquet_rows_are_named_with_their_place(tmp_path):
    cells = write(tmp_path, 'prompt,id\n"a\n\nb",1\n\n"",2\n', "rows.csv")
    assert 'rows.csv:6: field "prompt": found empty text' in refusal(prompts_of, cells)
    columns = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["a", "b", None], "messages": [None, None, None]}), columns)
    assert 'rows.parquet:row 3: field "prompt": found null' in refusal(prompts_of, columns)
    parquet.write_table(pyarrow.table({"prompt": [*"ab", None, *"a" * 97], "messages": [None] * 100}), columns)
    prompts, counts = prompts_of(columns, on_bad_row="skip")
    assert [prompt.where for prompt in prompts[:3]] == [f"rows.parquet:row {number}" for number in (1, 2, 4)]
    assert counts.skipped == 1


def test_parquet_messages_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([conversation("user: a", "assistant: b")]), path)
    assert examples_of(path, CHAT_TOKENIZER)[1].kept == 1


def test_the_first_twenty_faults_are_listed_and_all_are_counted(tmp_path):
    rows = [{"prompt": None if line % 2 == 0 else "a"} for line in range(1, 61)]
    message = refusal(prompts_of, write(tmp_path, rows))
    assert [line.split(":")[1] for line in message.splitlines() if line.startswith("  rows")] == [
        str(number) for number in range(2, 41, 2)
    ]
    assert "30 faulty rows in 60 read" in message
    assert "and 10 more" in message


def test_a_mixed_file_is_refused_even_where_bad_rows_are_skipped(tmp_path):
    rows = [{"prompt": "a"}] * 200 + [conversation("user: b")]
    assert "rows.jsonl:201: found a row with" in refusal(prompts_of, write(tmp_path, rows), on_bad_row="skip")


@pytest.mark.parametrize(("rows", "bad", "allowed"), [
    (2, 1, False), (99, 1, False), (100, 1, True), (200, 2, True), (200, 3, False), (700, 7, True),
])
def test_skip_leaves_out_one_percent_of_the_rows(tmp_path, rows, bad, allowed):
    path = write(tmp_path, [{"prompt": ""}] * bad + [{"prompt": "a"}] * (rows - bad))
    if allowed:
        prompts, counts = prompts_of(path, on_bad_row="skip")
        assert counts == Counts(read=rows, kept=rows - bad, truncated=0, dropped=0, skipped=bad)
        assert prompts[0].where == f"rows.jsonl:{bad + 1}"
    else:
        assert "these are more" in refusal(prompts_of, path, on_bad_row="skip")


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_source_without_a_usable_row_is_refused(tmp_path, content):
    assert "no row is left" in refusal(prompts_of, write(tmp_path, content), on_bad_row="skip")


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["<s> $A", "<s> $A </s>"])
def test_a_prompt_begins_with_one_bos_and_never_ends_with_an_end_token(tmp_path, around):
    path = write(tmp_path, [{"prompt": "ab"}, {"prompt": "<s>ab"}])
    prompts, _ = prompts_of(path, letter_tokenizer(around))
    assert [prompt.ids for prompt in prompts] == [(BOS, *ids_of("ab"))] * 2


def test_a_tokenizer_without_bos_gets_none(tmp_path):
    prompts, _ = prompts_of(write(tmp_path, [{"prompt": "ab"}]), letter_tokenizer("$A"))
    assert prompts[0].ids == ids_of("ab")


@pytest.mark.parametrize("around", ["$A", "<s> $A"])
def test_a_prompt_of_which_no_token_is_made_is_a_fault(tmp_path, around):
    tokenizer = letter_tokenizer(around)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("e", "removed")
    message = refusal(prompts_of, write(tmp_path, [{"prompt": "e"}]), tokenizer=tokenizer)
    assert "rows.jsonl:1: the tokenizer makes no token of 'e'" in message


def test_of_prompt_and_response_the_response_and_its_end_token_are_scored(tmp_path):
    examples, _ = examples_of(write(tmp_path, [{"prompt": "ab", "response": " cd"}]), letter_tokenizer("<s> $A </s>"))
    assert examples == [Example(
        (BOS, *ids_of("ab"), *ids_of(" cd"), END), (False, False, False, True, True, True, True), "rows.jsonl:1",
    )]


def test_of_a_text_all_but_the_first_token_is_scored(tmp_path):
    path = write(tmp_path, [{"text": "ab"}, {"text": "ab</s>"}])
    examples, _ = examples_of(path)
    assert [example.ids for example in examples] == [(BOS, *ids_of("ab"), END)] * 2
    assert examples[0].scored == (False, True, True, True)
    examples, _ = examples_of(path, end_token=None)
    assert examples[0].ids == (BOS, *ids_of("ab"))


def test_a_text_of_one_token_has_nothing_to_score(tmp_path):
    path = write(tmp_path, [{"text": "a"}])
    message = refusal(examples_of, path, tokenizer=letter_tokenizer("$A"), end_token=None)
    assert 'rows.jsonl:1: field "text": only 1 token' in message


def test_messages_go_through_the_chat_template(tmp_path):
    rows = [conversation("system: s", "user: hi"), conversation("user: a", "assistant: b", "tool: c")]
    (first, second), _ = prompts_of(write(tmp_path, rows), CHAT_TOKENIZER)
    system, tool, line_end = 2, 5, ids_of("\n")[0]
    assert first.ids == (BOS, system, *ids_of("s"), END, line_end, USER, *ids_of("hi"), END, line_end, ASSISTANT)
    assert second.ids[-5:] == (tool, *ids_of("c"), END, line_end, ASSISTANT)
    assert (first.text, first.messages) == ("system: s\n\nuser: hi", tuple(rows[0]["messages"]))     # as it was said
    assert first.ids.count(BOS) == 1


def test_a_plain_prompt_is_one_user_message_under_template_chat(tmp_path):
    path = write(tmp_path, [{"prompt": "hi"}])
    assert prompts_of(path, CHAT_TOKENIZER)[0][0].ids == (BOS, *ids_of("hi"))
    prompts, _ = prompts_of(path, CHAT_TOKENIZER, template="chat")
    assert prompts[0].ids == (BOS, USER, *ids_of("hi"), END, *ids_of("\n"), ASSISTANT)


def test_every_turn_of_the_assistant_is_scored_to_its_end_token(tmp_path):
    rows = [conversation("user: q", "assistant: yes", "user: r", "assistant: no", "user: s")]
    examples, _ = examples_of(write(tmp_path, rows), CHAT_TOKENIZER)
    example = examples[0]
    spoken = [token for token, scored in zip(example.ids, example.scored, strict=True) if scored]
    assert spoken == [*ids_of("yes"), END, *ids_of("no"), END]
    whole = CHAT_TOKENIZER.apply_chat_template(rows[0]["messages"], return_dict=False)
    assert example.ids == tuple(whole)[: len(example.ids)]
    assert example.ids[-1] == END       # what follows the last answer is of no use


def test_prompt_and_response_are_user_and_assistant_under_template_chat(tmp_path):
    plain = write(tmp_path, [{"prompt": "q", "response": "yes"}], "plain.jsonl")
    told = write(tmp_path, [conversation("user: q", "assistant: yes")], "told.jsonl")
    (from_plain,), _ = examples_of(plain, CHAT_TOKENIZER, template="chat")
    (from_messages,), _ = examples_of(told, CHAT_TOKENIZER)
    assert (from_plain.ids, from_plain.scored) == (from_messages.ids, from_messages.scored)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each_answer(tmp_path):
    # As reasoning models do: only the last answer keeps what stands before the dot.
    forgetful = letter_tokenizer(template=(
        "<s>{% for m in messages %}<|{{ m.role }}|>"
        "{{ m.content if loop.last else m.content.split('.')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ))
    path = write(tmp_path, [conversation("user: a", "assistant: b.c", "user: d", "assistant: e.f")])
    (first, second), counts = examples_of(path, forgetful)
    asked = (BOS, USER, *ids_of("a"), END, ASSISTANT)
    again = (*asked, *ids_of("c"), END, USER, *ids_of("d"), END, ASSISTANT)
    assert first == Example((*asked, *ids_of("b.c"), END), (False,) * 5 + (True,) * 4, "rows.jsonl:1")
    assert second == Example((*again, *ids_of("e.f"), END), (False,) * len(again) + (True,) * 4, "rows.jsonl:1")
    assert (counts.read, counts.kept, counts.notes) == (1, 1, counts.notes)
    assert counts.notes[0].startswith("2 examples of them")
    (last,), _ = examples_of(path, forgetful, turns="last")
    assert last == second


def test_the_last_turn_alone_can_be_learnt_from(tmp_path):
    path = write(tmp_path, [conversation("user: q", "assistant: yes", "user: r", "assistant: no")])
    (both,), _ = examples_of(path, CHAT_TOKENIZER)
    (last,), _ = examples_of(path, CHAT_TOKENIZER, turns="last")
    assert last.ids == both.ids
    assert (sum(both.scored), sum(last.scored)) == (4 + 3, 3)


def test_messages_that_the_template_refuses_are_a_fault_of_the_row(tmp_path):
    strict = letter_tokenizer(template="{{ raise_exception('no system role') if messages[0].role == 'system' }}<s>ab")
    rows = [conversation("user: a"), conversation("system: a", "user: b")]
    message = refusal(prompts_of, write(tmp_path, rows), tokenizer=strict)
    assert "rows.jsonl:2: the tokenizer's chat template refuses the messages: no system role" in message


def test_template_and_rows_that_do_not_fit_are_refused_with_the_key(tmp_path):
    messages = write(tmp_path, [conversation("user: a", "assistant: b")], "messages.jsonl")
    texts = write(tmp_path, [{"text": "a"}], "texts.jsonl")
    prompts = write(tmp_path, [{"prompt": "a"}], "prompts.jsonl")
    assert "has no chat template" in refusal(examples_of, messages)
    assert "has no chat template" in refusal(prompts_of, prompts, template="chat")
    assert "data.template: none cannot" in refusal(examples_of, messages, tokenizer=CHAT_TOKENIZER, template="none")
    assert 'with rows of "text"' in refusal(examples_of, texts, tokenizer=CHAT_TOKENIZER, template="chat")


def test_fields_beyond_the_form_are_ignored(tmp_path):
    rows = [{"prompt": "a", "messages": [], "text": 7}, {"prompt": "b", "id": {"x": None}}]
    assert [prompt.text for prompt in prompts_of(write(tmp_path, rows))[0]] == ["a", "b"]


# ---- too long ---------------------------------------------------------------------------------------------------


def test_a_long_prompt_loses_its_left_but_keeps_bos(tmp_path):
    path = write(tmp_path, [{"prompt": "abcdef"}, {"prompt": "abc"}])
    prompts, counts = prompts_of(path, max_prompt_tokens=4, on_overlong="truncate")
    assert [prompt.ids for prompt in prompts] == [(BOS, *ids_of("def")), (BOS, *ids_of("abc"))]
    assert prompts[0].text == "abcdef"
    assert counts == Counts(read=2, kept=2, truncated=1, dropped=0, skipped=0)
    prompts, _ = prompts_of(path, letter_tokenizer("$A"), max_prompt_tokens=4, on_overlong="truncate")
    assert prompts[0].ids == ids_of("cdef")


def test_a_long_response_loses_its_right_and_with_it_the_end_token(tmp_path):
    rows = [{"prompt": "abcd", "response": letters} for letters in ("ef", "efg", "efgh")]
    examples, counts = examples_of(
        write(tmp_path, rows), max_prompt_tokens=3, max_response_tokens=3, on_overlong="truncate"
    )
    prompt = (BOS, *ids_of("cd"))
    assert [example.ids for example in examples] == [
        (*prompt, *ids_of("ef"), END), (*prompt, *ids_of("efg")), (*prompt, *ids_of("efg")),
    ]
    assert {example.scored for example in examples} == {(False, False, False, True, True, True)}
    assert counts.truncated == 3


def test_a_long_text_is_cut_like_a_response(tmp_path):
    examples, counts = examples_of(
        write(tmp_path, [{"text": "abc"}, {"text": "abcd"}]), max_response_tokens=4, on_overlong="truncate"
    )
    assert [example.ids for example in examples] == [(BOS, *ids_of("abc"), END), (BOS, *ids_of("abcd"))]
    assert counts.truncated == 1


def test_long_rows_are_dropped_and_counted(tmp_path):
    path = write(tmp_path, [{"prompt": "abcdef"}, {"prompt": "abc"}, *[{"prompt": "abcde"}] * 97, {"prompt": ""}])
    prompts, counts = prompts_of(path, max_prompt_tokens=4, on_overlong="drop", on_bad_row="skip")
    assert [prompt.where for prompt in prompts] == ["rows.jsonl:2"]
    assert counts == Counts(read=100, kept=1, truncated=0, dropped=98, skipped=1)
    assert "no row is left of 100 (99 too long" in refusal(
        prompts_of, path, max_prompt_tokens=2, on_overlong="drop", on_bad_row="skip"
    )


def test_a_long_row_that_may_not_be_is_named_with_its_lengths(tmp_path):
    path = write(tmp_path, [{"prompt": "abc", "response": "a"}, {"prompt": "abcdef", "response": "bc"}])
    assert "rows.jsonl:2: the prompt has 7 tokens, wanted at most 5 (data.max_prompt_tokens)" in refusal(
        prompts_of, path, max_prompt_tokens=5
    )
    message = refusal(examples_of, path, max_prompt_tokens=5, max_response_tokens=2)
    assert "rows.jsonl:2: the prompt has 7 tokens, wanted at most 5 (data.max_prompt_tokens); the response" in message


# ---- the order of prompts ---------------------------------------------------------------------------------------


def test_every_epoch_is_a_permutation_and_differs_from_the_last():
    epochs = [shuffled_positions(50, start=50 * epoch, size=50, seed=3) for epoch in range(4)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert epochs[0] != shuffled_positions(50, start=0, size=50, seed=4)


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_windows_of_the_stream_join_to_the_stream(size):
    stream = shuffled_positions(7, start=0, size=60, seed=0)
    windows = [shuffled_positions(7, start, size, seed=0) for start in range(0, 60, size)]
    assert [position for window in windows for position in window][:60] == stream
    assert shuffled_positions(7, start=13, size=0, seed=0) == []


@pytest.mark.parametrize(("count", "start", "size"), [(0, 0, 1), (3, -1, 1), (3, 0, -1)])
def test_a_stream_without_rows_or_before_its_start_is_refused(count, start, size):
    with pytest.raises(ValueError, match="do not describe a part of a stream"):
        shuffled_positions(count, start, size, seed=0)


# ---- the stories model's tokenizer, which puts <s> and a space before every text ----------------------------------


@needs_stories
def test_story_prompts_round_trip_with_one_bos():
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    prompts, counts = prompts_of(STORIES / "prompts.jsonl", tokenizer, max_prompt_tokens=256)
    assert counts == Counts(read=500, kept=500, truncated=0, dropped=0, skipped=0)
    for prompt in prompts:
        assert prompt.ids[0] == tokenizer.bos_token_id == 1
        assert prompt.ids.count(1) == 1
        assert tokenizer.decode(prompt.ids, skip_special_tokens=True) == prompt.text


@needs_stories
def test_story_texts_are_scored_from_the_second_token_to_the_end_token():
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    examples, counts = examples_of(STORIES / "texts.jsonl", tokenizer, end_token=2, max_response_tokens=512)
    assert counts.kept == counts.read == 1000
    for example in examples:
        assert (example.ids[0], example.ids[-1]) == (1, 2)
        assert example.scored == (False,) + (True,) * (len(example.ids) - 1)


@needs_stories
def test_a_story_told_in_two_parts_has_the_tokens_of_the_whole_story(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    rows = [{"prompt": "Once upon a time,", "response": " there was a girl."}, {"prompt": "She r", "response": "an."}]
    examples, _ = examples_of(write(tmp_path, rows), tokenizer, end_token=None)
    assert examples[0].ids == tuple(tokenizer.encode("Once upon a time, there was a girl."))
    assert tokenizer.decode(examples[1].ids, skip_special_tokens=True) == "She ran."
