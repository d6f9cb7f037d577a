"""What keeps two models from being compared: tokenizers that are not one, with both sides named."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from kltune.errors import ModelError
from kltune.lm.data.chat import EndTokens, template_of, turn_end
from kltune.lm.data.examples import load_prompts
from kltune.lm.model.loading import tokenizer_differences
from kltune.recipe import DataSection


@pytest.fixture
def pair(tiny_model):
    """A tokenizer twice, to change one of the two."""
    return [AutoTokenizer.from_pretrained(tiny_model("llama")) for _ in range(2)]


def test_a_tokenizer_does_not_differ_from_itself(pair):
    assert tokenizer_differences(*pair) == []


def test_another_vocabulary_is_told_by_sizes_and_an_example(pair):
    mine, others = pair
    size = len(mine.get_vocab())
    mine.add_tokens(["brand-new"])
    (fault,) = tokenizer_differences(mine, others)
    assert f"found {size + 1} tokens, wanted {size}" in fault
    assert "'brand-new'" in fault


def test_another_end_of_text_is_told(pair):
    mine, others = pair
    mine.eos_token = mine.convert_ids_to_tokens(7)
    faults = tokenizer_differences(mine, others)
    assert any("eos_token_id is 7, wanted 1" in fault for fault in faults), faults


def test_two_templates_must_be_one_but_none_says_nothing(pair):
    mine, others = pair
    mine.chat_template = "{{ messages[0].content }}"
    assert tokenizer_differences(mine, others) == []
    others.chat_template = "{{ messages[-1].content }}"
    (fault,) = tokenizer_differences(mine, others)
    assert fault.startswith("chat template: found sha256")


CHATML = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} w9 </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
MESSAGES = {"messages": [{"role": "user", "content": "w5 w6"}]}


@pytest.fixture
def rows_of(open_policy, tiny_model, tmp_path):
    """Reads rows for a policy that a folder's tokenizer is held against; gives the prompts and what is noted."""

    def read(tokenizer, *rows, own_template=None, template="auto"):
        tokenizer.save_pretrained(tmp_path / "theirs")
        policy = open_policy()
        policy.tokenizer.chat_template = own_template
        policy.hold_against(tmp_path / "theirs", "checkpoint")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rules = policy.row_rules(DataSection(template=template), 40)
        prompts, counts = load_prompts(str(tmp_path / "rows.jsonl"), policy.tokenizer, rules)
        return [prompt.ids for prompt in prompts], " ".join(counts.notes)

    return read


def unused_token(tokenizer):
    tokenizer.add_tokens(["<|PAD_TOKEN|>"], special_tokens=True)
    tokenizer.pad_token = "<|PAD_TOKEN|>"


def more_special_tokens(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["w7"]})


def another_template(tokenizer):
    tokenizer.chat_template = CHATML


@pytest.mark.parametrize("change", [unused_token, more_special_tokens, another_template])
def test_a_tokenizer_that_makes_the_same_of_every_row_is_noted(pair, rows_of, change):
    mine, _ = pair
    change(mine)
    ids, note = rows_of(mine, {"prompt": "w5 w6"}, {"prompt": "w8"}, own_template="{{ messages[0].content }}")
    assert ids == [(5, 6), (8,)]
    assert note.startswith("checkpoint ")
    assert "its tokenizer is another than the reference's" in note


def test_the_refusal_names_the_folder_the_row_and_every_difference(pair, rows_of, tmp_path: Path):
    mine, _ = pair
    mine.add_tokens(["brand-new"])
    with pytest.raises(ModelError) as caught:
        rows_of(mine, {"prompt": "w5"}, {"prompt": "w5 brand-new"})
    for part in (str(tmp_path / "theirs"), "makes other tokens of 'w5 brand-new'", "vocabulary"):
        assert part in str(caught.value)


def test_another_template_matters_where_it_is_used(pair, rows_of):
    mine, _ = pair
    mine.chat_template = CHATML
    with pytest.raises(ModelError, match="makes other text by its chat template of 'w5 w6'"):
        rows_of(mine, MESSAGES, own_template=CHATML.replace("user", "w8").replace("w9", "w8"))


def test_a_reference_without_a_template_takes_that_of_the_checkpoint(pair, rows_of):
    mine, _ = pair
    mine.chat_template = CHATML
    ids, _ = rows_of(mine, MESSAGES)
    assert ids == [tuple(mine.encode("<s> user w5 w6 w9 </s> <s> assistant"))]


def test_another_end_of_a_response_is_refused(pair, rows_of):
    mine, _ = pair
    mine.eos_token = mine.convert_ids_to_tokens(7)
    with pytest.raises(ModelError, match="eos_token_id is 7, wanted 1"):
        rows_of(mine, {"prompt": "w5"})


def test_a_folder_that_brings_no_tokenizer_is_fine(open_policy, tmp_path: Path):
    policy = open_policy()
    policy.hold_against(tmp_path, "checkpoint")
    assert policy.other_tokenizers == ()


# --- where a turn ends ---------------------------------------------------------------------------------------------

TURNS = {
    "the template's own token": (CHATML.replace(" w9 </s>", " </t>"), 40),
    "behind a space": (CHATML.replace(" w9 </s>", " w9 </t>"), 40),
    "the tokenizer's end": (CHATML, 1),
}


@pytest.mark.parametrize(("template", "end"), TURNS.values(), ids=TURNS.keys())
def test_a_turn_ends_at_the_first_control_token_behind_it(pair, template, end):
    mine, _ = pair
    mine.add_tokens(["</t>"], special_tokens=False)
    mine.chat_template = template
    assert turn_end(mine) == end
    assert EndTokens.of(mine, [5, None]).ids == tuple(sorted({1, 5, end}))


@pytest.mark.parametrize(("special", "end"), [(False, None), (True, 40)])
def test_a_line_break_that_is_an_ordinary_token_ends_nothing(pair, special, end):
    mine, _ = pair
    mine.add_tokens([AddedToken("\n", special=special, normalized=False)], special_tokens=special)
    mine.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
    assert turn_end(mine) == end
    assert EndTokens.of(mine).ids == ((1,) if end is None else (1, end))


def test_a_template_that_ends_no_turn_has_no_end(pair):
    mine, _ = pair
    mine.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} w9 {% endfor %}"
    assert turn_end(mine) is None
    mine.chat_template = None
    assert turn_end(mine) is None


def test_end_tokens_without_a_logit_are_left_out_and_said_if_none_is_left(pair):
    mine, _ = pair
    ends = EndTokens.of(mine, [50], vocabulary=40)
    assert (ends.ids, ends.appended, ends.unreachable, ends.note) == ((1,), 1, (50,), "")
    none = EndTokens.of(mine, [50], vocabulary=1)
    assert (none.ids, none.appended) == ((), None)
    assert "goes on to the length limit" in none.note


def test_of_several_named_templates_the_default_is_taken(pair):
    mine, others = pair
    mine.chat_template = {"tool_use": "a", "default": "b"}
    others.chat_template = "b"
    assert template_of(mine) == "b"
    assert tokenizer_differences(mine, others) == []
    mine.chat_template = {"tool_use": "a", "rag": "b"}
    assert template_of(mine) == ""
