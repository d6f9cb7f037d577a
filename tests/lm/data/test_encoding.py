"""What ends a response, what a message spells, and what day a chat template is told."""

import json
import os
from datetime import date, datetime

import pytest
from test_data import (
    ASSISTANT,
    BOS,
    CHAT_TOKENIZER,
    END,
    USER,
    conversation,
    examples_of,
    ids_of,
    letter_tokenizer,
    prompts_of,
    refusal,
    write,
)
from test_pairs import pairs_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kltune.errors import DataError
from kltune.lm.data.chat import ChatTemplate, read_template
from kltune.lm.data.encoding import Encoder
from kltune.lm.data.rows import RowFault

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
ANSWER = "Put <s>old</s> around it, <|im_end|> and\n\nwrite new."


def byte_tokenizer(kind: str = "bytes", template: str = CHATML) -> PreTrainedTokenizerFast:
    """A small BPE of bytes, or one that puts a space before every text, as SentencePiece's do."""
    text = ["user assistant put old around it and then write new\n\nlines\n\n"] * 3
    bpe = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
    if kind == "bytes":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        scheme = {"replacement": "▁", "prepend_scheme": kind}
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(**scheme), decoders.Metaspace(**scheme)
        alphabet = sorted({chr(code) for code in range(32, 127)} | {"\n", "▁"})
    bpe.train_from_iterator(
        text, trainers.BpeTrainer(vocab_size=400, special_tokens=[*SPECIAL, "<unk>"], initial_alphabet=alphabet,
                                  show_progress=False)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[2:])})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "first", "always"])
def test_a_control_token_that_a_message_spells_stays_text(kind):
    tokenizer = byte_tokenizer(kind)
    encoder = Encoder(tokenizer, "auto", end_token=1, end_ids=[1, 3])
    asked = [{"role": "user", "content": "what does </s> do?"}]
    before, turn = encoder.answer([*asked, {"role": "assistant", "content": ANSWER}])
    assert [token for token in before if token < 4] == [2, 3, 2]        # the template's own
    assert [token for token in turn if token < 4] == [3]
    # split_special_tokens makes text of control tokens: exactly those tokens, then the template's end.
    spelled = tokenizer.encode("what does </s> do?", add_special_tokens=False, split_special_tokens=True)
    assert " ".join(map(str, spelled[1:])) in " ".join(map(str, before))
    assert tokenizer.decode(turn[:-1]).strip() == ANSWER
    assert tokenizer.decode(before) == tokenizer.decode(tokenizer.encode(
        encoder.chat.render(asked, to_answer=True), add_special_tokens=False))


def test_messages_without_control_tokens_are_what_transformers_makes_of_them():
    tokenizer = byte_tokenizer()
    messages = [{"role": "user", "content": "put it"}]
    whole = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert Encoder(tokenizer, "auto").chat_ids(messages, to_answer=True) == tuple(whole)


def test_control_tokens_in_messages_are_read_where_the_recipe_says_so():
    encoder = Encoder(byte_tokenizer(), "auto", control="tokens")
    assert 1 in encoder.chat_ids([{"role": "user", "content": "a </s> b"}], to_answer=True)


def test_an_end_token_that_cannot_be_kept_as_text_is_a_fault_of_the_row(tmp_path):
    # In a vocabulary of whole words the end token is one however it is read.
    told = conversation("user: q", "assistant: yes</s>no")
    message = refusal(examples_of, write(tmp_path, [told]), tokenizer=CHAT_TOKENIZER, control="tokens")
    assert "rows.jsonl:1: messages[1].content: spells '</s>', which ends a response, before its end" in message


@pytest.mark.parametrize(("rows", "read"), [
    ([{"prompt": "ab", "response": "c</s>d"}], examples_of),
    ([{"prompt": "ab", "chosen": "c</s>d", "rejected": "e"}], pairs_of),
])
def test_a_plain_response_that_goes_on_behind_an_end_token_is_named(tmp_path, rows, read):
    path = write(tmp_path, rows)
    assert "the response: spells '</s>', which ends a response, before its end" in refusal(read, path)


def test_a_plain_response_that_ends_already_ends_there(tmp_path):
    path = write(tmp_path, [{"prompt": "ab", "response": "c</s>\n"}, {"prompt": "ab", "response": "c<|user|>"}])
    (written, other), _ = examples_of(path, end_ids=(END, USER))
    assert written.ids == (BOS, *ids_of("abc"), END)
    assert other.ids == (BOS, *ids_of("abc"), USER)


def test_plain_rows_that_spell_control_tokens_are_named_in_a_note_or_read_as_letters(tmp_path):
    tokenizer = byte_tokenizer()
    path = write(tmp_path, [{"prompt": "put"}, {"prompt": "<s>put"}, {"prompt": "<|im_start|>put"}, {"prompt": "a<s>"}])
    prompts, counts = prompts_of(path, tokenizer)
    assert [prompt.ids.count(0) for prompt in prompts] == [1, 1, 1, 2]
    (note,) = counts.notes
    assert note.startswith("rows.jsonl:3 and 1 more rows spell control tokens, as <|im_start|>")
    prompts, counts = prompts_of(path, tokenizer, control="text")
    assert [[token for token in prompt.ids if token < 4] for prompt in prompts] == [[0]] * 4
    assert counts.notes == ()


def test_a_turn_ends_at_any_token_that_ends_a_response_and_nothing_behind_it_is_scored(tmp_path):
    # As Gemma does: the template ends a turn with a token of its own and a line break, eos is another one.
    template = (
        "<s>{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|tool|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer, tool = letter_tokenizer(template=template), 5
    told = conversation("user: q", "assistant: yes", "user: r", "assistant: no")
    (example,), _ = examples_of(write(tmp_path, [told]), tokenizer, end_ids=(END, tool))
    spoken = [token for token, scored in zip(example.ids, example.scored, strict=True) if scored]
    assert spoken == [*ids_of("yes"), tool, *ids_of("no"), tool]
    sides = {"prompt": [{"role": "user", "content": "q"}], "chosen": "yes", "rejected": "no"}
    (pair,), _ = pairs_of(write(tmp_path, [sides], "pairs.jsonl"), tokenizer, template="chat", end_ids=(END, tool))
    assert pair.chosen.ids == (*ids_of("yes"), tool)


@pytest.mark.parametrize("content", ["\nyes", "\n\nyes", " yes"])
def test_an_answer_that_begins_with_white_space_is_cut_into_tokens_apart_from_its_prompt(content):
    tokenizer = byte_tokenizer()
    encoder = Encoder(tokenizer, "auto", end_token=1, end_ids=[3])
    asked = [{"role": "user", "content": "put"}]
    before, turn = encoder.answer([*asked, {"role": "assistant", "content": content}])
    assert before == encoder.chat_ids(asked, to_answer=True)
    assert turn == (*tokenizer.encode(content, add_special_tokens=False), 3)


@pytest.mark.parametrize("kind", ["bytes", "first", "always"])
@pytest.mark.parametrize("content", ["old and new", "Put it.", " put", "\nput"])
def test_a_conversation_has_the_tokens_that_transformers_gives_it_behind_a_control_token(tmp_path, kind, content):
    tight = (       # nothing stands between a control token and the answer
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}<|im_end|>{% else %}</s>{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(kind, tight)
    told = conversation("user: what is it", f"assistant: {content}", "user: and then", f"assistant: {content}")
    (example,), _ = examples_of(write(tmp_path, [told]), tokenizer, end_token=1, end_ids=(1,))
    assert example.ids == tuple(tokenizer.apply_chat_template(told["messages"], return_dict=False))
    answer = example.ids[example.scored.index(True):]
    asked = tokenizer.apply_chat_template(told["messages"][:1], return_dict=False)
    assert example.ids[: example.scored.index(True)] == tuple(asked)
    # the same, with the template applied beforehand: plain rows begin with bos
    written = {"prompt": "what is it<|im_end|>", "response": content}
    (plain,), _ = examples_of(write(tmp_path, [written], "plain.jsonl"), tokenizer, end_token=1, end_ids=(1,))
    assert plain.ids == (0, *example.ids[: len(asked) + answer.index(1) + 1])
    row = {"prompt": told["messages"][:1], "chosen": content, "rejected": "then"}
    (pair,), _ = pairs_of(write(tmp_path, [row], "pairs.jsonl"), tokenizer, end_token=1, end_ids=(1,))
    assert pair.prompt.ids + pair.chosen.ids == example.ids[: len(asked) + answer.index(1) + 1]


DATED = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}: " + CHATML


def test_a_template_that_asks_for_the_day_is_told_the_one_it_is_given(tmp_path):
    tokenizer = byte_tokenizer(template=DATED)
    messages = [{"role": "user", "content": "put"}]
    told = ChatTemplate(tokenizer, date(2020, 1, 2)).render(messages, to_answer=True)
    assert told.startswith("02 Jan 2020: <|im_start|>user")
    now = ChatTemplate(tokenizer, datetime.now().date()).render(messages, to_answer=True)
    assert now == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    (prompt,), counts = prompts_of(
        write(tmp_path, [{"messages": messages}]), tokenizer, day=date(2020, 1, 2), end_ids=(3,)
    )
    assert tokenizer.decode(prompt.ids) == told
    assert counts.notes == ("the chat template writes the date, and here it is always 2020-01-02 (data.date, --date)",)


def test_a_form_that_the_template_makes_up_is_refused():
    tokenizer = byte_tokenizer(template="{{ strftime_now('%' ~ 'd') }}" + CHATML)
    with pytest.raises(RowFault, match="asks for the time in a form that is not written out"):
        ChatTemplate(tokenizer, date(2020, 1, 2)).render([{"role": "user", "content": "a"}], to_answer=True)


def test_a_template_that_fails_on_a_row_names_it(tmp_path):
    tokenizer = letter_tokenizer(template="{{ messages[0]['content'] + 1 }}")
    message = refusal(prompts_of, write(tmp_path, [conversation("user: a")]), tokenizer=tokenizer)
    assert "rows.jsonl:1: the tokenizer's chat template refuses the messages" in message


def test_a_pipe_is_no_chat_template(tmp_path):
    os.mkfifo(tmp_path / "chat.jinja")
    with pytest.raises(DataError, match=r"chat\.jinja cannot be read: it is a pipe or a device"):
        read_template(str(tmp_path / "chat.jinja"))


def test_several_templates_without_a_default_are_named(tmp_path):
    tokenizer = letter_tokenizer(template={"rag": "a", "tool_use": "b"})
    message = refusal(prompts_of, write(tmp_path, json.dumps(conversation("user: a"))), tokenizer=tokenizer)
    assert "has chat templates called rag, tool_use and none called default" in message


def test_what_was_said_has_nothing_of_the_template(tmp_path):
    rows = [conversation("user: a"), conversation("user: a", "assistant: b", "user: c")]
    (one, several), _ = prompts_of(write(tmp_path, rows), CHAT_TOKENIZER)
    assert (one.text, several.text) == ("a", "user: a\n\nassistant: b\n\nuser: c")
    assert one.ids == (BOS, USER, *ids_of("a"), END, *ids_of("\n"), ASSISTANT)


THINKING = (        # as DeepSeek-R1's: an answer begins with a tag, and of answers given the thoughts are left out
    "{% for m in messages %}<|im_start|>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)


def test_an_answer_goes_on_from_what_the_template_begins_it_with():
    tokenizer = byte_tokenizer(template=THINKING)
    encoder = Encoder(tokenizer, "auto", end_token=1, end_ids=[3])
    asked = {"role": "user", "content": "put"}
    before, turn = encoder.answer([asked, {"role": "assistant", "content": "<think>\nold</think>new </s>"}])
    assert before == encoder.chat_ids([asked], to_answer=True)
    spelled = tokenizer.encode("old</think>new </s>", add_special_tokens=False, split_special_tokens=True)
    assert turn == (*spelled, 3)
    with pytest.raises(RowFault, match=r"which it begins with '<think>\\n'; an answer that begins so can be learnt"):
        encoder.answer([asked, {"role": "assistant", "content": "new"}])


def test_a_template_that_ends_no_answer_is_warned_of(tmp_path):
    told = conversation("user: q", "assistant: yes")
    endless = letter_tokenizer(template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
                                        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    (example,), counts = examples_of(write(tmp_path, [told]), endless)
    assert example.ids[-1] == ids_of("\n")[0]
    assert counts.notes[0].startswith("warning: the chat template writes '\\n' behind an answer, and no token")
    assert examples_of(write(tmp_path, [told]), CHAT_TOKENIZER)[1].notes == ()


AGENT = (       # writes calls and thoughts as Qwen3's template does, with apply_chat_template as the judge of them
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": [2]}}}]
ASKED = {"role": "user", "content": "put old and new"}


def answered(answer: dict) -> list[dict]:
    """Rows with one conversation: the assistant answers so."""
    return [{"messages": [ASKED, {"role": "assistant"} | answer]}]


@pytest.mark.parametrize("content", [{"content": ""}, {"content": None}, {}, {"content": "new"}])
def test_what_an_answer_thinks_and_calls_is_learnt_as_the_template_writes_it(tmp_path, content):
    tokenizer = byte_tokenizer(template=AGENT)
    last = {"role": "assistant", "reasoning_content": "add them", "tool_calls": CALL, **content}
    path = write(tmp_path, [{"messages": [ASKED, last | {"tool_call_id": None}]}])
    ((example,), _) = examples_of(path, tokenizer, end_token=1, end_ids=(3,))
    text = tokenizer.apply_chat_template([ASKED, last | {"content": content.get("content") or ""}], tokenize=False)
    assert tokenizer.decode(example.ids) == text.removesuffix("\n")
    said = [token for token, scored in zip(example.ids, example.scored, strict=True) if scored]
    assert tokenizer.decode(said).startswith("<think>add them</think>")


def test_nulls_that_parquet_puts_into_every_call_are_not_arguments(tmp_path):
    tokenizer = byte_tokenizer(template=AGENT)
    filled = [{"type": "function", "function": {"name": "sum", "arguments": {"a": 1, "b": [2], "city": None}}}]
    texts = [
        examples_of(write(tmp_path, answered({"tool_calls": calls}), f"{name}.jsonl"),
                    tokenizer, end_token=1, end_ids=(3,))[0][0].ids
        for name, calls in (("plain", CALL), ("filled", filled))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("more", "fault"),
    [
        ({"reasoning_content": "add them"}, '"messages[1].reasoning_content": the chat template writes nothing of it'),
        ({"tool_calls": CALL}, '"messages[1].tool_calls": the chat template writes nothing of it'),
    ],
)
def test_what_a_template_would_leave_out_of_an_answer_is_named(tmp_path, more, fault):
    path = write(tmp_path, answered({"content": "new"} | more))
    assert fault in refusal(examples_of, path, tokenizer=byte_tokenizer(), end_token=1, end_ids=(3,))


def test_descriptions_of_tools_are_not_left_out_without_a_word(tmp_path):
    row = {"messages": [ASKED, {"role": "assistant", "content": "new"}]}
    tools = [{"type": "function", "function": {"name": "sum"}}]
    path = write(tmp_path, [row | {"tools": tools}])
    tokenizer = byte_tokenizer(template=AGENT)
    assert 'field "tools": descriptions of tools' in refusal(examples_of, path, tokenizer=tokenizer)
    empty = write(tmp_path, [row | {"tools": []}], "empty.jsonl")
    assert len(examples_of(empty, tokenizer, end_token=1, end_ids=(3,))[0]) == 1


def test_an_end_token_in_the_arguments_of_a_call_cuts_no_answer_short(tmp_path):
    calls = [{"function": {"name": "sum", "arguments": {"a": "old <|im_end|> new"}}}]
    path = write(tmp_path, answered({"tool_calls": calls}))
    how = {"tokenizer": byte_tokenizer(template=AGENT), "end_token": 1, "end_ids": (3,)}
    ((example,), _) = examples_of(path, **how)      # its letters, as in any content
    assert how["tokenizer"].decode(example.ids).endswith('{"a": "old <|im_end|> new"}}</call><|im_end|>')
    fault = refusal(examples_of, path, control="tokens", **how)
    assert "spells '<|im_end|>', which ends a response, before its end" in fault


def test_text_parts_are_one_text_and_other_parts_are_named(tmp_path):
    tokenizer = byte_tokenizer()
    parts = [{"type": "text", "text": "put old", "image": None}, {"type": "text", "text": " and new"}]
    listed = write(tmp_path, [{"messages": [{"role": "user", "content": parts}]}], "listed.jsonl")
    plain = write(tmp_path, [{"messages": [ASKED]}], "plain.jsonl")
    assert prompts_of(listed, tokenizer)[0][0].ids == prompts_of(plain, tokenizer)[0][0].ids
    seen = write(tmp_path, [{"messages": [{"role": "user", "content": [*parts, {"type": "image"}]}]}], "seen.jsonl")
    assert 'messages[0].content[2]": found a part of type "image"' in refusal(prompts_of, seen, tokenizer=tokenizer)


def test_a_system_message_and_what_a_tool_says_may_be_empty(tmp_path):
    tokenizer = byte_tokenizer()
    path = write(tmp_path, [{"messages": [{"role": "system", "content": ""}, ASKED]}])
    ((prompt,), _) = prompts_of(path, tokenizer)
    assert tokenizer.decode(prompt.ids).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")
