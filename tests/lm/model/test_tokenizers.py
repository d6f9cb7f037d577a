"""What keeps two models from being compared: tokenizers that are not one, with both sides named."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from kltune.errors import ModelError
from kltune.lm.model.loading import check_same_tokenizer, tokenizer_differences


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


def test_the_refusal_names_both_folders_and_every_difference(pair, tmp_path: Path):
    mine, others = pair
    mine.add_tokens(["brand-new"])
    mine.chat_template, others.chat_template = "a", "b"
    mine.save_pretrained(tmp_path)
    with pytest.raises(ModelError) as caught:
        check_same_tokenizer(tmp_path, others, "checkpoint")
    for part in (str(tmp_path), others.name_or_path, "vocabulary", "chat template"):
        assert part in str(caught.value)


def test_a_folder_that_brings_no_tokenizer_is_fine(pair, tmp_path: Path):
    check_same_tokenizer(tmp_path, pair[1], "checkpoint")
