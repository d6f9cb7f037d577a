"""Responses token by token: texts that join, the KL that plain logits give, and both sides on the same numbers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kltune.lm.data.examples import Prompt
from kltune.lm.measure.breakdown import pieces, transcript
from kltune.lm.measure.measurement import Round, answer_both
from kltune.lm.model.sampler import Draw
from tests.tiny_policies import plain_distributions

PROMPTS = [Prompt((0, 5, 9, 3), "w5 w9 w3", "p:1"), Prompt((0, 7), "w7", "p:2"), Prompt((0, 4, 4), "w4 w4", "p:3")]
DRAW = Draw(7, seed=3)


def test_the_kl_of_each_token_is_that_of_the_two_distributions_it_was_drawn_from(trained_policy, tiny_model):
    after, _ = answer_both(trained_policy, Round(PROMPTS, 0, 3, 1), DRAW)
    rollout, network = after.rollouts[0], trained_policy.network
    theirs = plain_distributions(AutoModelForCausalLM.from_pretrained(tiny_model()), rollout.ids, rollout.scored)
    with torch.no_grad():
        logits = network.logits(network.hidden(rollout.ids))[:, :-1].double()
    mine = torch.log_softmax(logits, -1)[rollout.scored[:, 1:]]
    wanted = (mine.exp() * (mine - theirs)).sum(-1)
    shown = [transcript(rollout, row, trained_policy.tokenizer) for row in range(3)]
    assert wanted.min() > 0.0
    found = torch.tensor([nats for row in shown for nats in row["token_kl"]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for row, nats in zip(shown, after.exact.tolist(), strict=True):
        assert sum(row["token_kl"]) == pytest.approx(nats, rel=1e-5)
        assert len(row["tokens"]) == len(row["token_kl"])


def test_tokens_join_to_the_text_also_where_a_letter_takes_several():
    class Bytes:
        """One token a byte."""

        def decode(self, ids):
            return bytes(ids).decode("utf-8", errors="replace")

    ids = list("né €!".encode())
    assert pieces(ids, Bytes()) == ["n", "", "é", " ", "", "", "€", "!"]
    assert "".join(pieces(ids[:-2], Bytes())) == "né \N{REPLACEMENT CHARACTER}"      # cut within a letter
