"""A served model against one that is here: the same KL, and each thing that a server may do wrong by its name."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.lm.measure import server as asking
from tests.rollout_servers import serving
from tests.servers import LlamaCpp, StandIn, standing_in
from tests.stages.conftest import HELD_OUT, small_llama, write_rows
from tests.stages.test_references import adapter_on
from tests.train.test_rollout_server import recipe_of


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_PAUSE", 0.0)


@pytest.fixture
def adapter(tmp_path, llama):
    return adapter_on(llama, tmp_path / "adapter", 1)


@pytest.fixture
def prompts(tmp_path):
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in HELD_OUT])
    return "--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 5, "--top-logprobs", 8


def model_of(llama, adapter=None):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


@pytest.fixture
def serve(llama, adapter):
    """A context: the adapter, or the base, behind a server with some switches."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    return lambda served=adapter, **switches: standing_in(StandIn(model_of(llama, served), tokenizer, **switches))


def kl_of(document, name):
    return document["kl"][name]["nats_per_response"], document["kl"][name]["stderr"]


def test_both_ways_round_the_kl_is_the_exact_one(eval_kl, serve, adapter, llama, prompts):
    exact, error = kl_of(eval_kl(adapter, *prompts[:4], "--responses", 400)[1], "exact")
    for served, here in ((adapter, llama), (None, adapter)):
        with serve(served) as standing:
            policy, reference = (standing.url, here) if served else (here, standing.url)
            code, document, err = eval_kl(policy, "--reference", reference, *prompts, "--responses", 100)
        assert code == 0, err
        topk, spread = kl_of(document, "topk")
        assert topk == pytest.approx(exact, abs=3 * (error**2 + spread**2) ** 0.5)
        assert document["kl"]["exact"] is None
        assert document["reference"]["path"] == str(reference)
        assert 0.3 < document["server"]["mass"] < 0.99
        assert max(abs(document[name]) for name in ("agreement_z", "surprise_z", "tail_z")) < 4
        if served:
            sampled = [body for body in standing.asked if "seed" in body]
            assert len({body["seed"] for body in sampled}) == 100
            assert all(body["temperature"] == body["top_p"] == 1 and body["top_k"] == 0 for body in sampled)


def test_of_two_servers_the_tokens_are_summed_that_both_speak_of(eval_kl, serve, adapter, llama, prompts, tmp_path):
    exact, error = kl_of(eval_kl(adapter, *prompts[:4], "--responses", 400)[1], "exact")
    words = tmp_path / "words"
    shutil.copytree(llama, words, ignore=shutil.ignore_patterns("*.safetensors"))
    with serve() as policy, serve(None) as reference:
        asked = (policy.url, "--reference", reference.url, *prompts)
        code, document, err = eval_kl(*asked, "--tokenizer", words, "--responses", 200)
        assert code == 0, err
        itself = eval_kl(policy.url, "--reference", policy.url, *prompts, "--tokenizer", words, "--responses", 20)[1]
        assert eval_kl(*asked)[0] == eval_kl(policy.url, "--reference", llama, *prompts, "--tokenizer", words)[0] == 2
    topk, spread = kl_of(document, "topk")
    assert topk == pytest.approx(exact, abs=3 * (error**2 + spread**2) ** 0.5)
    assert kl_of(itself, "topk") == pytest.approx((0.0, 0.0), abs=1e-4)
    assert document["reference"] == {"path": reference.url, "sha256": None}
    assert 0.2 < document["server"]["mass"] < itself["server"]["mass"]


def test_rows_that_fill_the_context_leave_room_for_what_scoring_draws(eval_kl, serve, adapter, llama, tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"prompt": text * 40} for text in HELD_OUT])
    asked = ("--prompts", tmp_path / "long.jsonl", "--max-new-tokens", 5, "--top-logprobs", 8, "--responses", 10)
    for served, here in ((adapter, llama), (None, adapter)):
        with serve(served) as standing:
            pair = (standing.url, here) if served else (here, standing.url)
            code, _, err = eval_kl(pair[0], "--reference", pair[1], *asked)
        assert code == 0, err


@pytest.mark.parametrize(("fault", "said"), [
    ({"other_words": True}, "ids mean other tokens there"), ({"scores": False}, "cannot be a reference"),
])
def test_a_served_reference_of_a_served_policy_is_looked_at_as_well(eval_kl, serve, llama, prompts, fault, said):
    with serve() as policy, serve(None, **fault) as reference:
        asked = (policy.url, "--reference", reference.url, *prompts, "--tokenizer", llama, "--responses", 10)
        code, _, err = eval_kl(*asked)
    assert code == 5
    assert f"{reference.url}: " in err
    assert said in err


def test_one_key_is_not_told_to_two_hosts(eval_kl, serve, llama, prompts, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serve() as policy, serve(None) as reference:
        asked = (policy.url, "--reference", reference.url, *prompts, "--tokenizer", llama, "--key-env", "MY_KEY")
        assert eval_kl(*asked)[0] == 2
        assert policy.asked == reference.asked == []


def test_the_gate_and_its_files_know_a_server(eval_kl, serve, llama, prompts, tmp_path):
    with serve() as standing:
        arguments = (standing.url, "--reference", llama, *prompts, "--responses", 40, "--junit", tmp_path / "kl.xml")
        assert eval_kl(*arguments, "--max-kl", 50)[0] == 0
        code, document, _ = eval_kl(*arguments, "--max-kl", 0.001)
        assert (code, document["gate"]["reference"]) == (3, str(llama))
        assert standing.url in (tmp_path / "kl.xml").read_text()
        text = eval_kl(*arguments, as_json=False)[1]
    unknown = ("forward", "js", "entropy", "alignment_tax", "top_tokens", "top_prompts", "by_position")
    assert [document[name] for name in unknown] == [None, None, {"policy": None, "reference": None}, None, [], [], []]
    assert document["kl"]["exact"] is document["kl"]["k3"] is None
    assert "8 likeliest tokens summed (" in text
    assert f"against {llama}" in text


STALE = small_llama(32, seed=5)
FAULTS = {
    "another temperature, raw": ({"temperature": 0.5}, "not a sample of the distribution"),
    "another temperature, processed": ({"temperature": 0.3, "processed": True}, "scored twice differ by"),
    "top-k": ({"keep": 4}, "not a sample of the distribution"),
    "a stale adapter": ({"stale": STALE}, "scored twice differ by"),
    "other tokens": ({"other_words": True}, "ids mean other tokens there"),
    "a token before the prompt": ({"prefix": (0,)}, "put a token before them"),
    "few log-probs": ({"cap": 5}, "asked for 8 log-probs at each token, got"),
    "no ids": ({"drops": ("token_ids",)}, "its answer has no token ids"),
    "no log-probs": ({"drops": ("logprobs",)}, "its answer has no log-probs"),
    "a short answer": ({"short": True}, "it cut a response at 4 tokens, asked for 5"),
    "another model": ({"called": "gpt"}, "it answers as the model gpt"),
    "no completion": ({"body": b"<html>"}, "no completion in JSON"),
    "aborted": ({"says": {"finish_reason": "abort"}}, "ended for 'abort'"),
    "a redirect": ({"fails": [302]}, "HTTP 302"),
    "no such model": ({"fails": [404]}, "are url and model right?"),
    "no key": ({"fails": [401]}, "is the key right"),
    "ended by what it was asked": ({"dies": True}, "; at first: HTTP 500"),
    "always busy": ({"fails": [503] * 999}, "no answer in 4 tries; the last: HTTP 503"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_server_is_named(eval_kl, serve, llama, prompts, fault):
    switches, words = FAULTS[fault]
    with serve(**switches) as standing:
        count = 120 if "sample" in words else 10
        code, document, err = eval_kl(standing.url, "--reference", llama, *prompts, "--responses", count)
    assert (code, document) == (5, "")
    assert words in err


def test_what_passes_is_asked_again(eval_kl, serve, llama, prompts):
    with serve(fails=[503, 0, 429]) as standing:
        assert eval_kl(standing.url, "--reference", llama, *prompts, "--responses", 20)[0] == 0


def test_a_server_that_scores_no_prompts_can_be_a_policy_and_no_reference(eval_kl, serve, adapter, llama, prompts):
    with serve(scores=False) as standing:
        code, document, err = eval_kl(standing.url, "--reference", llama, *prompts, "--responses", 20)
        assert code == 0
        assert "could not be scored again" in err
        assert len(document["warnings"]) == 1
        code, _, err = eval_kl(adapter, "--reference", standing.url, *prompts, "--responses", 20)
    assert code == 5
    assert "cannot be a reference" in err


def llama_cpp(llama, adapter, **switches):
    return standing_in(LlamaCpp(model_of(llama, adapter), AutoTokenizer.from_pretrained(llama), **switches))


def test_the_server_of_llama_cpp_is_measured_as_the_policy(eval_kl, adapter, llama, prompts):
    with llama_cpp(llama, adapter) as standing:
        code, document, err = eval_kl(standing.url, "--reference", llama, *prompts, "--responses", 100)
        assert code == 0, err
        assert "could not be scored again" in err
        kl, stderr = kl_of(document, "topk")
        exact, exact_stderr = kl_of(eval_kl(adapter, *prompts[:4], "--responses", 400)[1], "exact")
        assert kl == pytest.approx(exact, abs=3 * math.hypot(stderr, exact_stderr))
        code, _, err = eval_kl(adapter, "--reference", standing.url, *prompts, "--responses", 20)
    assert code == 5
    assert "cannot be a reference" in err


LLAMA_CPP_FAULTS = {
    "a token inside of a character": ({"hides": 1}, "of 5 tokens: llama.cpp leaves out"),
    "other tokens": ({"other_words": True}, "ids mean other tokens there"),
    "top-k": ({"keep": 4}, "not a sample of the distribution"),
    "no ids": ({"says": {"logprobs": {"content": [{"token": "a", "logprob": -1, "top_logprobs": []}]}}}, "name no ids"),
    "no log-probs": ({"says": {"logprobs": {"content": [{"id": 3, "logprob": -1.0}]}}}, "name no ids"),
    "other things": ({"says": {"logprobs": {"content": ["a", None]}}}, "name no ids"),
    "a log-prob that is none": ({"says": {"logprobs": {"content": [{"id": 3, "logprob": "x", "top_logprobs": [
        {"id": place, "logprob": -9.0} for place in range(8)]}] * 5}}}, "missing, no number or above 0"),
    "an id that is none": ({"says": {"logprobs": {"content": [{"id": -3, "logprob": -1.0, "top_logprobs": []}] * 5}}},
                           "no token ids"),
}


@pytest.mark.parametrize("fault", LLAMA_CPP_FAULTS)
def test_each_fault_of_llama_cpp_is_named(eval_kl, adapter, llama, prompts, fault):
    switches, words = LLAMA_CPP_FAULTS[fault]
    with llama_cpp(llama, adapter, **switches) as standing:
        count = 120 if "sample" in words else 10
        code, document, err = eval_kl(standing.url, "--reference", llama, *prompts, "--responses", count)
    assert (code, document) == (5, "")
    assert words in err


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(eval_kl, serve, llama, prompts, monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    with serve() as standing:
        arguments = (standing.url, "--reference", llama, *prompts, "--responses", 10)
        _, document, err = eval_kl(*arguments, "--key-env", "MY_KEY")
        assert {headers["Authorization"] for headers in standing.headers} == {"Bearer sk-very-secret"}
        assert "sk-very-secret" not in json.dumps(document) + err
        assert eval_kl(*arguments, "--key-env", "NO_SUCH_KEY")[0] == 2


@pytest.mark.parametrize("address", [
    "http://192.0.2.1/v1#m", "http://127.0.0.1:8000/v1", "http://user:pw@127.0.0.1/v1#m", "http://127.0.0.1:x/v1#m",
])
def test_an_address_that_others_can_listen_to_or_that_is_none_is_refused(eval_kl, llama, prompts, address):
    code, _, err = eval_kl(address, "--reference", llama, *prompts)
    assert code == 2
    assert "pw" not in err


@pytest.mark.parametrize("more", [
    ("--temperature", 0.7), ("--direction", "both"), ("--auto", "--max-kl", 1), ("--top-p", 0.9), ("--against", "x"),
])
def test_what_a_server_cannot_be_asked_is_refused(eval_kl, llama, prompts, more):
    assert eval_kl("http://127.0.0.1:1/v1#m", "--reference", llama, *prompts, *more)[0] == 2
    assert eval_kl("http://127.0.0.1:1/v1#m", "--reference", "http://127.0.0.1:1/v1#n", *prompts)[0] == 2


@pytest.mark.parametrize("command_line", [
    ("sample", "http://127.0.0.1:1/v1#m", "--prompt", "a"), ("merge", "http://127.0.0.1:1/v1#m", "--output", "out"),
    ("sample", "ADAPTER", "--reference", "http://127.0.0.1:1/v1#m", "--prompt", "a"),
    ("project", "http://127.0.0.1:1/v1#m", "--max-kl", 1, "--output", "out"),
])
def test_what_needs_weights_does_not_take_a_server(command, adapter, command_line):
    code, _, err = command(*(adapter if word == "ADAPTER" else word for word in command_line))
    assert code == 2
    assert "a served model has a KL" in err


def test_a_measurement_by_a_recipe_with_a_server_has_its_responses_from_there(tmp_path, llama, eval_kl):
    adapter = adapter_on(llama, tmp_path / "adapter", 1)
    with serving(llama) as server:
        recipe = recipe_of(tmp_path, llama, server)
        asked = (adapter, "--recipe", recipe.folder / "recipe.yaml", "--responses", 60)
        code, drawn, err = eval_kl(*asked, "--direction", "both")
        assert code == 0, err
        elsewhere = eval_kl(*asked, "--reference", adapter_on(llama, tmp_path / "other", 2))[1]
        assert f"responses drawn by {server.url}" in eval_kl(*asked[:-1], 8, as_json=False)[1]
    here = eval_kl(adapter, "--prompts", recipe.data.prompts, "--temperature", 0.8, "--max-new-tokens", 6)[1]
    assert here["sampler"] is None
    found, own = (document["kl"]["exact"] for document in (drawn, here))
    assert found["nats_per_response"] == pytest.approx(
        own["nats_per_response"], abs=3 * (found["stderr"] ** 2 + own["stderr"] ** 2) ** 0.5
    )
    for document in (drawn, elsewhere):
        assert document["sampler"]["url"] == server.url
        assert 0.0 <= document["sampler"]["kl_nats_per_token"] < 1e-9
    assert len(server.names) == 3
    assert server.unloaded == server.names


@pytest.mark.parametrize(("more", "said"), [
    (None, "the policy is a whole model"), ({"use_dora": True}, "is a DoRA"), ({"bias": "lora_only"}, "trains a bias"),
    ({"target_modules": ["q_proj", "lm_head"]}, "changes the head"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "changes the embedding"),
])
def test_a_server_is_given_a_lora_of_layers_and_nothing_that_it_leaves_out(tmp_path, llama, eval_kl, more, said):
    policy = llama
    if more is not None:
        policy, config = tmp_path / "odd", LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **more})
        model = get_peft_model(model_of(llama), config)
        model.save_pretrained(policy)
    with serving(llama) as server:
        recipe = recipe_of(tmp_path, llama, server)
        code, _, err = eval_kl(policy, "--reference", llama, "--recipe", recipe.folder / "recipe.yaml")
    assert (code, server.names) == (5, [])
    assert said in err
    assert f"measure {server.url}/v1#MODEL" in err
