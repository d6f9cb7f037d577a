"""Fixtures that several tests of models share."""

import pytest
from transformers import GenerationConfig

from kltune.lm.model.policy import Policy
from tests.tiny_policies import randomize, save_tiny_model


@pytest.fixture(scope="module")
def many_ends(tmp_path_factory):
    """A Llama whose generation_config lists several end tokens; eos_token_id of its tokenizer is one of them."""
    folder = save_tiny_model(tmp_path_factory.mktemp("many_ends"))
    GenerationConfig(eos_token_id=[5, 11, 17], bos_token_id=0).save_pretrained(folder)
    return folder


@pytest.fixture
def ending_policy(open_policy, many_ends) -> Policy:
    policy = open_policy(path=many_ends)
    randomize(policy.trainable_parameters())
    return policy
