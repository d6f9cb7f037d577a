"""Preference pairs: every form becomes the same tokens, every wrong row is named with its place."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kltune.lm.data.examples import Counts
from kltune.lm.data.pairs import Answer, Labelled, Pair, load_labelled, load_pairs
from tests.lm.data.test_data import (
    ASSISTANT,
    BOS,
    CHAT_TOKENIZER,
    END,
    LETTER_TOKENIZER,
    SHARED,
    STORIES_MODEL,
    TEMPLATE,
    conversation,
    ids_of,
    letter_tokenizer,
    prompts_of,
    refusal,
    rules,
    write,
)

HARMLESS = SHARED / "data" / "hh-harmless" / "raw.jsonl"
PAIR = {"prompt": "ab", "chosen": "cd", "rejected": "e"}
MARK = "\n\nAssistant:"


def read(loader, source, tokenizer=LETTER_TOKENIZER, **changes):
    own = {"margins": changes.pop("margins")} if "margins" in changes else {}
    return loader(str(source), tokenizer, rules(**changes), **own)


def pairs_of(source, tokenizer=LETTER_TOKENIZER, **changes) -> tuple[list[Pair], Counts]:
    return read(load_pairs, source, tokenizer, **changes)


def labelled_of(source, tokenizer=LETTER_TOKENIZER, **changes) -> tuple[list[Labelled], Counts]:
    return read(load_labelled, source, tokenizer, **changes)


def turns(*spoken: str) -> list[dict[str, str]]:
    return conversation(*spoken)["messages"]


# ---- the forms --------------------------------------------------------------------------------------------------


def test_texts_become_a_prompt_and_two_responses_that_end(tmp_path):
    (pair,), counts = pairs_of(write(tmp_path, [PAIR]))
    assert pair.prompt.ids == (BOS, *ids_of("ab"))
    assert (pair.prompt.text, pair.prompt.where) == ("ab", "rows.jsonl:1")
    assert pair.chosen == Answer((*ids_of("cd"), END), "cd")
    assert pair.rejected == Answer((*ids_of("e"), END), "e")
    assert counts == Counts(read=1, kept=1, truncated=0, dropped=0, skipped=0)


def test_without_an_end_token_none_is_appended(tmp_path):
    (pair,), _ = pairs_of(write(tmp_path, [PAIR]), end_token=None)
    assert pair.chosen.ids == ids_of("cd")


SAME_CONVERSATION = {
    "explicit": {"prompt": turns("user: ab"), "chosen": turns("assistant: cd"), "rejected": turns("assistant: e")},
    "texts as sides": {"prompt": turns("user: ab"), "chosen": "cd", "rejected": "e"},
    "a text as prompt": {"prompt": "ab", "chosen": turns("assistant: cd"), "rejected": turns("assistant: e")},
    "messages as prompt": {**conversation("user: ab"), "chosen": "cd", "rejected": "e"},
    "implicit": {"chosen": turns("user: ab", "assistant: cd"), "rejected": turns("user: ab", "assistant: e")},
    "implicit, prompt repeated": {
        "prompt": "ab", "chosen": turns("user: ab", "assistant: cd"), "rejected": turns("user: ab", "assistant: e"),
    },
}


@pytest.mark.parametrize("row", SAME_CONVERSATION.values(), ids=SAME_CONVERSATION.keys())
def test_messages_in_any_form_become_what_the_template_writes(tmp_path, row):
    (pair,), _ = pairs_of(write(tmp_path, [row]), CHAT_TOKENIZER)
    written = CHAT_TOKENIZER.apply_chat_template(turns("user: ab"), add_generation_prompt=True, tokenize=True)
    written = written["input_ids"] if not isinstance(written, list) else written
    assert pair.prompt.ids == tuple(written)
    assert pair.prompt.ids[-1] == ASSISTANT
    assert pair.chosen == Answer((*ids_of("cd"), END), "cd")     # without the line break that the template puts behind
    assert pair.rejected == Answer((*ids_of("e"), END), "e")


def test_chat_makes_a_text_prompt_one_message_of_the_user(tmp_path):
    (plain,), _ = pairs_of(write(tmp_path, [PAIR]), CHAT_TOKENIZER, template="chat")
    (messages,), _ = pairs_of(write(tmp_path, [SAME_CONVERSATION["explicit"]]), CHAT_TOKENIZER)
    assert (plain.prompt.ids, plain.chosen, plain.rejected) == (messages.prompt.ids, messages.chosen, messages.rejected)


def test_a_longer_conversation_scores_the_last_answer_only(tmp_path):
    shared = ("user: a", "assistant: b", "user: c")
    row = {"chosen": turns(*shared, "assistant: d"), "rejected": turns(*shared, "assistant: e")}
    (pair,), _ = pairs_of(write(tmp_path, [row]), CHAT_TOKENIZER)
    assert pair.chosen.ids == (*ids_of("d"), END)
    assert set(ids_of("abc")) < set(pair.prompt.ids)


def test_transcripts_share_the_prompt_up_to_the_last_answer_they_have_in_common(tmp_path):
    start = f"\n\nHuman: x{MARK} Yes.\n\nHuman: y{MARK}"
    row = {"chosen": f"{start} So{MARK} it is", "rejected": f"{start} So no"}
    (pair,), _ = pairs_of(write(tmp_path, [row]))
    assert pair.prompt.text == start
    assert (pair.chosen.text, pair.rejected.text) == (f" So{MARK} it is", " So no")


def test_a_pair_whose_answers_begin_alike_is_not_cut_in_the_middle(tmp_path):
    row = {"chosen": f"a{MARK} same, then b", "rejected": f"a{MARK} same, then c"}
    (pair,), _ = pairs_of(write(tmp_path, [row]))
    assert pair.chosen.text == " same, then b"


def test_responses_labelled_one_by_one(tmp_path):
    rows = [{"prompt": "a", "response": "b", "label": label} for label in (True, False, 1, 0, "true", "False")]
    labelled, counts = labelled_of(write(tmp_path, rows))
    assert [item.wanted for item in labelled] == [True, False] * 3
    assert labelled[0].prompt.ids == (BOS, *ids_of("a"))
    assert labelled[0].response == Answer((*ids_of("b"), END), "b")
    assert counts.kept == 6


def test_labels_may_come_from_csv(tmp_path):
    path = write(tmp_path, "prompt,response,label\na,b,true\na,c,FALSE\na,d,1\na,e,0\n", "rows.csv")
    assert [item.wanted for item in labelled_of(path)[0]] == [True, False] * 2


def test_a_pair_is_two_labelled_responses(tmp_path):
    labelled, counts = labelled_of(write(tmp_path, [PAIR, PAIR]))
    assert [(item.response.text, item.wanted) for item in labelled] == [("cd", True), ("e", False)] * 2
    assert counts.kept == 2


@pytest.mark.parametrize("row", [PAIR, *SAME_CONVERSATION.values()])
def test_the_prompts_of_pairs_can_be_read_alone(tmp_path, row):
    path = write(tmp_path, [row])
    assert prompts_of(path, CHAT_TOKENIZER)[0] == [pair.prompt for pair in pairs_of(path, CHAT_TOKENIZER)[0]]


def test_an_empty_answer_is_no_fault_of_its_prompt(tmp_path):
    (prompt,), _ = prompts_of(write(tmp_path, [{"chosen": f"a{MARK} b", "rejected": f"a{MARK} "}]))
    assert prompt.text == f"a{MARK}"


# ---- wrong rows -------------------------------------------------------------------------------------------------

WRONG = {
    "no prompt in common": ({"chosen": f"a{MARK} b", "rejected": f"c{MARK} d"}, "share no beginning that ends with"),
    "no marker": ({"chosen": "a b", "rejected": "a c"}, 'or a field "prompt"'),
    "an empty answer": ({"chosen": f"a{MARK} b", "rejected": f"a{MARK} "}, 'field "rejected": found nothing behind'),
    "equal transcripts": ({"chosen": f"a{MARK} b", "rejected": f"a{MARK} b"}, "are equal"),
    "equal texts": (PAIR | {"rejected": "cd"}, "are equal, wanted two different responses"),
    "empty": (PAIR | {"chosen": ""}, 'field "chosen": found empty text'),
    "white space": (PAIR | {"rejected": "\n"}, 'field "rejected": found only white space'),
    "null": (PAIR | {"chosen": None}, 'field "chosen": found null'),
    "missing": ({"prompt": "a", "chosen": "b"}, 'field "rejected": missing'),
    "other names": ({"question": "a", "answer": "b"}, 'found "question", "answer"'),
    "prompt empty": (PAIR | {"prompt": ""}, 'field "prompt": found empty text'),
    "two answers": (
        SAME_CONVERSATION["explicit"] | {"chosen": turns("assistant: c", "user: d", "assistant: e")},
        'field "chosen": found 3 messages, wanted one of the assistant',
    ),
    "answered prompt": (
        SAME_CONVERSATION["explicit"] | {"prompt": turns("user: a", "assistant: b")}, "wanted system, user or tool",
    ),
    "a user's answer": (
        {"chosen": turns("user: a", "assistant: b", "user: c"), "rejected": turns("user: a", "assistant: b")},
        'field "chosen": found user in the last message, wanted assistant',
    ),
    "two conversations": (
        {"chosen": turns("user: a", "assistant: b"), "rejected": turns("user: c", "assistant: b")},
        "differ before their last message",
    ),
    "another prompt": (
        SAME_CONVERSATION["implicit"] | {"prompt": "xy"}, 'field "prompt": not the prompt that "chosen" and "rejected"',
    ),
    "half messages": (
        {"chosen": turns("user: a", "assistant: b"), "rejected": "c"}, "field \"rejected\": found the text 'c', wanted",
    ),
}


@pytest.mark.parametrize(("row", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_pair_is_named_with_its_line_and_what_is_wrong(tmp_path, row, words):
    message = refusal(pairs_of, write(tmp_path, [row]), tokenizer=CHAT_TOKENIZER)
    assert "rows.jsonl:1: " in message
    assert words in message


@pytest.mark.parametrize("label", [2, -1, 0.5, "yes", "", None, [], float("nan")])
def test_a_label_that_is_none_is_named(tmp_path, label):
    row = {"prompt": "a", "response": "b", "label": label}
    assert 'rows.jsonl:2: field "label": found' in refusal(
        labelled_of, write(tmp_path, [row | {"label": True}, row])
    )


def test_skip_leaves_out_one_wrong_row_and_counts_it(tmp_path):
    path = write(tmp_path, [PAIR, PAIR | {"prompt": None}, *[PAIR] * 98])
    pairs, counts = pairs_of(path, on_bad_row="skip")
    assert [pair.prompt.where for pair in pairs[:2]] == ["rows.jsonl:1", "rows.jsonl:3"]
    assert counts == Counts(read=100, kept=99, truncated=0, dropped=0, skipped=1)


def test_one_form_in_a_file(tmp_path):
    path = write(tmp_path, [PAIR, {**conversation("user: a"), "chosen": "b", "rejected": "c"}])
    assert "wanted one form in a file" in refusal(pairs_of, path, tokenizer=CHAT_TOKENIZER, on_bad_row="skip")


@pytest.mark.parametrize("row", [PAIR | {"prompt": f"a{MARK}"}, {"chosen": f"a{MARK} b", "rejected": f"a{MARK} c"}])
def test_transcripts_do_not_go_through_a_chat_template(tmp_path, row):
    assert "wanted data.template: none" in refusal(
        pairs_of, write(tmp_path, [row]), tokenizer=CHAT_TOKENIZER, template="chat"
    )


def test_messages_need_a_template(tmp_path):
    path = write(tmp_path, [SAME_CONVERSATION["explicit"]])
    assert "has no chat template" in refusal(pairs_of, path)
    assert "data.template: none cannot be used" in refusal(pairs_of, path, tokenizer=CHAT_TOKENIZER, template="none")


def test_a_template_that_rewrites_what_came_before_is_refused(tmp_path):
    tokenizer = letter_tokenizer(template=TEMPLATE.replace("<s>", "<s>{{ 'xx' if messages|length == 1 else '' }}"))
    assert 'field "messages[1]": before this answer the chat template writes something else than before' in refusal(
        pairs_of, write(tmp_path, [SAME_CONVERSATION["explicit"]]), tokenizer=tokenizer
    )


# ---- lengths ----------------------------------------------------------------------------------------------------

LONG = {"prompt": "abcdef", "chosen": "ghij", "rejected": "k"}


def test_truncation_takes_prompts_from_the_left_and_responses_from_the_right(tmp_path):
    limits = {"max_prompt_tokens": 3, "max_response_tokens": 2, "on_overlong": "truncate"}
    (pair, short), counts = pairs_of(write(tmp_path, [LONG, {"prompt": "a", "chosen": "b", "rejected": "c"}]), **limits)
    assert pair.prompt.ids == (BOS, *ids_of("ef"))
    assert pair.chosen.ids == ids_of("gh")          # the text does not end here, so no end token
    assert pair.rejected.ids == (*ids_of("k"), END)
    assert short.chosen.ids == (*ids_of("b"), END)
    assert counts == Counts(read=2, kept=2, truncated=1, dropped=0, skipped=0)


@pytest.mark.parametrize("limits", [{"max_prompt_tokens": 6}, {"max_response_tokens": 4}])
def test_over_long_pairs_are_dropped_or_refused(tmp_path, limits):
    path = write(tmp_path, [PAIR, LONG])
    assert pairs_of(path, on_overlong="drop", **limits)[1] == Counts(2, kept=1, truncated=0, dropped=1, skipped=0)
    message = refusal(pairs_of, path, on_overlong="error", **limits)
    assert "rows.jsonl:2: the prompt has 7 tokens" in message
    assert "the longest response has 5" in message


def test_a_pair_that_truncation_makes_equal_teaches_nothing_and_is_dropped(tmp_path):
    path = write(tmp_path, [PAIR, {"prompt": "a", "chosen": "bcd", "rejected": "bce"}])
    pairs, counts = pairs_of(path, max_response_tokens=2, on_overlong="truncate")
    assert counts == Counts(read=2, kept=1, truncated=1, dropped=1, skipped=0)
    assert len(pairs) == 1


def test_sides_that_differ_only_for_the_eye_are_faulty(tmp_path):
    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="b"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    path = write(tmp_path, [{"prompt": "a", "chosen": "a b", "rejected": "a  b"}])
    assert "are the same tokens" in refusal(pairs_of, path, tokenizer=tokenizer)


# ---- where the prompt ends --------------------------------------------------------------------------------------


def test_a_token_never_spans_prompt_and_response(tmp_path):
    merging = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>")
    assert tokenizer.encode("ab") == [2]        # together they are one token
    (pair,), _ = pairs_of(write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "a"}]), tokenizer, end_token=3)
    assert (pair.prompt.ids, pair.chosen.ids) == ((0,), (1, 3))


@pytest.mark.skipif(not (HARMLESS.is_file() and STORIES_MODEL.is_dir()), reason="shared/ with hh-harmless is not here")
def test_hh_rlhf_as_it_is_published(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(STORIES_MODEL)
    lines = HARMLESS.read_text(encoding="utf-8").splitlines()[:300]     # of which line 277 has an empty answer
    path = write(tmp_path, "\n".join(lines))
    options = {"tokenizer": tokenizer, "end_token": 2, "max_prompt_tokens": 9999, "max_response_tokens": 9999}
    assert 'rows.jsonl:277: field "chosen": found nothing behind' in refusal(pairs_of, path, **options)
    pairs, counts = pairs_of(path, on_bad_row="skip", **options)
    assert counts == Counts(read=300, kept=299, truncated=0, dropped=0, skipped=1)
    for pair in pairs:
        row = json.loads(lines[int(pair.prompt.where.partition(":")[2]) - 1])
        assert pair.prompt.text.endswith(MARK)
        assert pair.prompt.text + pair.chosen.text == row["chosen"]
        assert pair.prompt.text + pair.rejected.text == row["rejected"]
        assert pair.chosen.ids[-1] == pair.rejected.ids[-1] == 2
        joined = tokenizer.decode(pair.prompt.ids + pair.chosen.ids, skip_special_tokens=True)
        assert joined == tokenizer.decode(tokenizer.encode(row["chosen"]), skip_special_tokens=True)
