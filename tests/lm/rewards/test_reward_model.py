"""A reward model reads the last token; on a policy's weights it is one more adapter, and moves no bit of the policy."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kltune.errors import ModelError, ScorerError
from kltune.lm.data.encoding import Encoder, spelled
from kltune.lm.data.examples import Prompt
from kltune.lm.measure.interpolation import AdapterScale
from kltune.lm.model.adapters.weights import POLICY
from kltune.lm.model.batches import Samples
from kltune.lm.model.fingerprint import weights_sha256
from kltune.lm.model.opening import probe_logits
from kltune.lm.model.policy import Policy
from kltune.lm.model.sampler import sample
from kltune.lm.rewards.reward_model import HEAD, RewardModel, open_reward_model
from kltune.lm.rewards.scorers import load_scorer
from kltune.recipe import LoraSection, ModelReward
from tests.tiny_policies import BOS, EOS, UNKNOWN, randomize, save_tiny_model

CPU = torch.device("cpu")
ROWS = [(3, 4, 5), (6, 7), (8, 9, 10, 11, EOS), (12,)]
WIDE = LoraSection(rank=2, alpha=4.0)                       # every linear layer
NARROW = LoraSection(rank=4, alpha=8.0, targets=("q_proj",))


def save_reward(folder: Path, model: RewardModel, *, reads_text: bool = True) -> Path:
    """A reward model as ``kltune reward`` saves it, but for the manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder)
    info = {
        "stage": "reward", "reference": model.policy.fingerprint.as_dict(),
        "reward": {"probe": model.probe(), "reads_text": reads_text},
    }
    (folder / "kltune.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


@pytest.fixture
def new_reward(open_policy) -> Callable[..., RewardModel]:
    """A function that makes a reward model of random numbers; keywords as for ``open_policy``."""

    def make(**keywords) -> RewardModel:
        model = RewardModel(open_policy(**{"lora": WIDE} | keywords))
        randomize(model.trainable_parameters())
        return model

    return make


@pytest.fixture
def saved_reward(new_reward, tmp_path) -> Path:
    """A saved reward model on the tiny Llama."""
    return save_reward(tmp_path / "reward", new_reward())


def drawn(policy, count: int = 6, length: int = 5) -> Samples:
    """Responses of a policy to two prompts, some cut and some ended."""
    prompts = [Prompt((3, 4, 5), "w3 w4 w5", ""), Prompt((6, 7), "w6 w7", "")] * (count // 2)
    uniforms = torch.rand(count, length, generator=torch.Generator().manual_seed(0))
    return sample(policy, prompts, uniforms, temperature=1.0)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_score_is_the_head_on_the_last_token_of_the_adapted_trunk(new_reward, tiny_model, tmp_path):
    model = new_reward()
    folder = save_reward(tmp_path / "reward", model)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model()), folder).eval()
    weight, bias = model.head.linear.weight[0].detach(), model.head.linear.bias.item()
    by_hand = []
    for row in ROWS:
        with torch.no_grad():
            hidden = plain(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1]
        by_hand.append((hidden[0, -1] @ weight).item() + bias)
    assert max(by_hand) - min(by_hand) > 0.1
    assert model.measure_rows(ROWS).tolist() == pytest.approx(by_hand, abs=1e-5)


def test_a_fresh_reward_model_gives_0_and_learns_in_adapter_and_head(open_policy):
    model = RewardModel(open_policy(lora=WIDE))
    assert model.measure_rows(ROWS).tolist() == [0.0] * 4
    randomize(model.head_parameters())
    model.scores(*model.batch(ROWS)).sum().backward()
    grads = [tensor.grad for name, tensor in model.trainable_parameters().items() if "lora_B" in name or "head" in name]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    assert all(tensor.dtype == torch.float32 for tensor in model.head_parameters().values())


def test_rows_score_the_same_alone_and_beside_longer_ones(new_reward):
    model = new_reward()
    alone = torch.stack([model.measure_rows([row])[0] for row in ROWS])
    assert torch.allclose(model.measure_rows(ROWS), alone, atol=1e-5)


def test_the_head_is_float32_over_a_bfloat16_base(open_policy):
    model = RewardModel(open_policy(lora=WIDE, dtype="bfloat16"))
    randomize(model.trainable_parameters())
    assert model.measure_rows(ROWS).dtype == torch.float32
    assert model.head.linear.weight.dtype == torch.float32


def test_centring_makes_the_mean_0_and_moves_no_difference(new_reward):
    model = new_reward()
    before = model.measure_rows(ROWS)
    shift = model.centre(ROWS)
    after = model.measure_rows(ROWS)
    assert shift == pytest.approx(before.mean().item(), abs=1e-6)
    assert after.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert torch.allclose(after - after[0], before - before[0], atol=1e-5)


def test_the_readme_says_how_to_score_without_kltune_and_the_lines_work(new_reward, tmp_path):
    model = new_reward()
    folder = save_reward(tmp_path / "reward", model)
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    scope = {"ids": torch.tensor([ROWS[0]])}
    exec(code.replace("this/folder", str(folder)), scope)
    assert scope["score"] == pytest.approx(model.measure_rows(ROWS[:1]).item(), abs=1e-5)


# --- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [WIDE, NARROW, LoraSection(rank=3, targets=("v_proj", "down_proj"))])
@pytest.mark.parametrize("values", [False, True])
def test_beside_a_policy_it_scores_as_alone_and_the_policy_stays_as_it_is(open_policy, saved_reward, lora, values):
    policy = open_policy(lora=lora)
    randomize(policy.trainable_parameters())
    if values:
        policy.add_value_function(lora)
        randomize(policy.value_parameters())
    ids, scored = torch.tensor([[3, 4, 5, 6]]), torch.tensor([[False, False, True, True]])
    logits, value = probe_logits(policy), policy.measure_values(ids, scored)[0] if values else None
    with policy.reference():
        reference = probe_logits(policy)
    names = {name: tensor.clone() for name, tensor in policy.trainable_parameters().items()}
    sha256 = policy.frozen_sha256()

    shared, digest, note = open_reward_model(saved_reward, policy, CPU)
    alone, other, said = open_reward_model(saved_reward, None, CPU)
    assert (shared.shared, alone.shared) == (True, False)
    assert digest == other
    assert "shares the policy's weights" in note
    assert "weights of its own" in said
    assert torch.equal(shared.model.measure_rows(ROWS), alone.model.measure_rows(ROWS))
    assert shared(["w3 w4 "], ["w5"]) == alone(["w3 w4 "], ["w5"])

    assert torch.equal(probe_logits(policy), logits)
    with policy.reference():
        assert torch.equal(probe_logits(policy), reference)
    if values:
        assert torch.equal(policy.measure_values(ids, scored)[0], value)
        assert all(tensor.requires_grad for tensor in policy.value_parameters().values())
    now = policy.trainable_parameters()
    assert now.keys() == names.keys() == policy.untrained.keys()
    assert all(torch.equal(now[name], names[name]) and now[name].requires_grad for name in names)
    assert not any(tensor.requires_grad for tensor in policy._switch.parameters("reward").values())
    assert policy.frozen_sha256() == sha256
    AdapterScale(policy).set(0.0)                              # it finds the policy's own tensors, and their start
    assert torch.equal(probe_logits(policy), reference)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2"])
def test_other_architectures_share_as_well(open_policy, new_reward, tmp_path, architecture):
    folder = save_reward(tmp_path / "reward", new_reward(architecture=architecture))
    policy = open_policy(architecture)
    randomize(policy.trainable_parameters())
    shared, alone = open_reward_model(folder, policy, CPU)[0], open_reward_model(folder, None, CPU)[0]
    assert shared.shared
    assert torch.equal(shared.model.measure_rows(ROWS), alone.model.measure_rows(ROWS))


def test_it_adds_only_its_adapter_and_head_to_what_is_held(open_policy, saved_reward):
    def held(policy) -> int:
        return sum(tensor.numel() for tensor in policy.model.parameters())

    policy = open_policy(lora=NARROW)
    base = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_pretrained(policy.fingerprint.path).parameters())
    before = held(policy)
    pointers = {tensor.data_ptr() for tensor in policy._reference_tensors.values()}
    open_reward_model(saved_reward, policy, CPU)
    adapter = sum(tensor.numel() for tensor in load_file(saved_reward / "adapter_model.safetensors").values())
    assert held(policy) - before == adapter < base / 2
    assert {tensor.data_ptr() for tensor in policy._reference_tensors.values()} == pointers
    alone, _, _ = open_reward_model(saved_reward, None, CPU)
    assert held(alone.model.policy) == base + adapter


def test_two_reward_models_lie_side_by_side(open_policy, new_reward, saved_reward, tmp_path):
    other = new_reward(lora=NARROW)
    randomize(other.trainable_parameters(), seed=5)
    second = save_reward(tmp_path / "second", other)
    policy = open_policy()
    readers = [open_reward_model(folder, policy, CPU)[0] for folder in (saved_reward, second)]
    assert [reader.model.adapter for reader in readers] == ["kltune_reward", "kltune_reward1"]
    wanted = [open_reward_model(folder, None, CPU)[0].model.measure_rows(ROWS) for folder in (saved_reward, second)]
    for reader, scores in zip(readers, wanted, strict=True):
        assert torch.equal(reader.model.measure_rows(ROWS), scores)


def test_training_the_policy_moves_no_score(open_policy, saved_reward):
    policy = open_policy()
    reader, _, _ = open_reward_model(saved_reward, policy, CPU)
    before = reader.model.measure_rows(ROWS)
    randomize(policy.trainable_parameters())
    assert torch.equal(reader.model.measure_rows(ROWS), before)


def test_a_saved_policy_has_nothing_of_the_reward_model(open_policy, saved_reward, tmp_path):
    policy = open_policy(lora=NARROW)
    open_reward_model(saved_reward, policy, CPU)
    policy.save(tmp_path / "policy")
    names = load_file(tmp_path / "policy" / "adapter_model.safetensors")
    assert len(names) == 4                                     # A and B of q_proj in two layers
    again = open_policy(lora=NARROW)
    again.load_adapter(tmp_path / "policy")
    policy.load_adapter(tmp_path / "policy")                   # as a resumed run does


def test_a_reward_model_on_base_and_sft_shares_with_a_policy_on_the_same(open_policy, new_reward, tmp_path):
    sft = open_policy()
    randomize(sft.trainable_parameters())
    sft.save(tmp_path / "sft")
    model = new_reward(sft_adapter=str(tmp_path / "sft"))
    folder = save_reward(tmp_path / "reward", model)
    shared, _, _ = open_reward_model(folder, open_policy(sft_adapter=str(tmp_path / "sft")), CPU)
    assert shared.shared
    assert torch.equal(shared.model.measure_rows(ROWS), model.measure_rows(ROWS))
    apart, _, note = open_reward_model(folder, open_policy(), CPU)        # a policy on the bare base
    assert not apart.shared
    assert "weights: found" in note
    assert torch.equal(apart.model.measure_rows(ROWS), model.measure_rows(ROWS))


@pytest.mark.parametrize("other", ["model", "tokenizer", "template", "settings", "ends"])
def test_another_base_or_tokenizer_gets_weights_of_its_own_and_a_note(open_policy, saved_reward, tmp_path, other):
    changed = {"settings": {"rms_norm_eps": 1e-3}, "ends": {"eos_token_id": [EOS, 5]}}.get(other, {})
    folder = save_tiny_model(tmp_path / "other", seed=int(other == "model"), **changed)
    if other in ("tokenizer", "template"):
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["w3"], vocabulary["w4"] = vocabulary["w4"], vocabulary["w3"]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if other == "template":
        shutil.copy(saved_reward / "tokenizer.json", folder / "tokenizer.json")
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    policy = open_policy(path=folder)
    reader, _, note = open_reward_model(saved_reward, policy, CPU)
    assert not reader.shared
    assert {"model": "weights: found", "tokenizer": "tokenizer: found", "template": "chat template",
            "settings": "rms_norm_eps found", "ends": "end of a response: ids found"}[other] in note
    own = Encoder(reader.model.policy.tokenizer, end_token=EOS)
    row = spelled(own, "w3 w4 ", "w5", True, None)
    assert row == (3, 4, 5, EOS)
    samples = drawn(policy)
    rows = [
        spelled(own, p, r, not cut, None)
        for p, r, cut in zip(samples.prompts, samples.responses, samples.truncated.tolist(), strict=True)
    ]
    assert reader.read(samples) == pytest.approx(reader.model.measure_rows(rows).tolist(), abs=1e-5)


# --- as a scorer -----------------------------------------------------------------------------------------------------


def test_sampled_responses_are_read_as_sampled_and_cut_ones_without_an_end(open_policy, saved_reward):
    policy = open_policy()
    scorer = load_scorer([ModelReward(kind="model", path=str(saved_reward), weight=2.0)], saved_reward, CPU, policy)
    samples = drawn(policy, 20)
    assert 0 < samples.truncated.sum() < 20
    rows = [
        tuple(ids[: int(mask.nonzero().max()) + 1].tolist())
        for ids, mask in zip(samples.ids, samples.scored, strict=True)
    ]
    assert [row[-1] == EOS for row in rows] == (~samples.truncated).tolist()
    wanted = 2.0 * scorer.sources[0].function.model.measure_rows(rows)
    found = scorer(samples.prompts, samples.responses, [samples])
    assert torch.allclose(found, wanted, atol=1e-5)
    # Where no special token was said on the way, the text gives the same tokens, and weights of its own the same score.
    plain = torch.tensor([not {BOS, EOS, UNKNOWN} & set(row[:-1]) and row[-1] not in (BOS, UNKNOWN) for row in rows])
    assert 3 < plain.sum() < 20
    apart = load_scorer([ModelReward(kind="model", path=str(saved_reward), weight=2.0)], saved_reward, CPU)
    total = apart(samples.prompts, samples.responses, [samples])
    assert torch.allclose(total[plain], wanted[plain], atol=1e-5)
    assert scorer.identity[0]["sha256"] == apart.identity[0]["sha256"]
    assert len(scorer.notes) == 1


def test_what_was_learnt_from_plain_text_reads_the_text_of_messages(open_policy, saved_reward):
    policy = open_policy()
    asked = {"role": "user", "content": "w3 w4 "}
    prompts = [Prompt((9, 3, 4, 5), "w3 w4 ", "", (asked,)), Prompt((3, 4), "w3 w4 ", "")]
    uniforms = torch.rand(2, 5, generator=torch.Generator().manual_seed(0))
    chat, plain = (sample(policy, [prompt], uniforms, temperature=1.0) for prompt in prompts)
    reader, _, _ = open_reward_model(saved_reward, policy, CPU)
    encoder = Encoder(policy.tokenizer, end_token=EOS)
    rows = [spelled(encoder, "w3 w4 ", said, not cut, None)
            for said, cut in zip(chat.responses, chat.truncated.tolist(), strict=True)]
    assert reader.read(chat) == pytest.approx(reader.model.measure_rows(rows).tolist(), abs=1e-5)
    assert reader.example(prompts[0]).endswith("reads as plain text, as 'w3 w4 RESPONSE'")
    assert "reads the policy's own tokens" in reader.example(prompts[1])
    wanted = [tuple(row[: int(mask.nonzero().max()) + 1].tolist())
              for row, mask in zip(plain.ids, plain.scored, strict=True)]
    assert reader.read(plain) == pytest.approx(reader.model.measure_rows(wanted).tolist(), abs=1e-5)


def test_what_was_learnt_from_a_template_refuses_plain_prompts(open_policy, new_reward, tmp_path):
    policy = open_policy()
    reader, _, _ = open_reward_model(save_reward(tmp_path / "chat", new_reward(), reads_text=False), policy, CPU)
    asked = Prompt((3, 4), "w3 w4", "")
    for read in (lambda: reader.read(drawn(policy)), lambda: reader.example(asked)):
        with pytest.raises(ModelError, match=r"it learnt from rows that the chat template wrote.*data\.template: chat"):
            read()
    assert "own tokens" in reader.example(replace(asked, messages=({"role": "user", "content": "w3 w4"},)))


def test_a_normalised_reward_model_is_standardised_on_its_own_reading(open_policy, saved_reward):
    policy = open_policy()
    entry = ModelReward(kind="model", path=str(saved_reward), normalize=True)
    samples = drawn(policy, 20)
    scorer = load_scorer([entry], saved_reward, CPU, policy).standardized(samples.prompts, samples.responses, [samples])
    total = scorer(samples.prompts, samples.responses, [samples])
    assert (total.mean().item(), total.std().item()) == (pytest.approx(0.0, abs=1e-5), pytest.approx(1.0, abs=1e-5))


def test_silence_is_scored_and_long_texts_are_cut_from_the_left(saved_reward):
    reader, _, _ = open_reward_model(saved_reward, None, CPU)
    model = reader.model
    assert reader([""], [""]) == pytest.approx(model.measure_rows([(EOS,)]).tolist())
    long = "w3 " * 100
    limit = model.policy.max_context
    assert reader([long], ["w4"]) == pytest.approx(model.measure_rows([(3,) * (limit - 2) + (4, EOS)]).tolist())


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_wrong_share_is_caught_by_the_probe(open_policy, saved_reward):
    head = load_file(saved_reward / HEAD)
    save_file(head | {"bias": head["bias"] + 1.0}, saved_reward / HEAD)
    with pytest.raises(ModelError, match=r"gives its probe the score .* not the ones trained together"):
        open_reward_model(saved_reward, open_policy(), CPU)


def test_a_share_on_other_weights_would_be_caught_by_the_probe_alone(open_policy, saved_reward, tmp_path):
    # As if the fingerprints had agreed wrongly: the record says this other base is the one.
    policy = open_policy(path=save_tiny_model(tmp_path / "other", seed=1))
    record = json.loads((saved_reward / "kltune.json").read_text())
    (saved_reward / "kltune.json").write_text(json.dumps(record | {"reference": policy.fingerprint.as_dict()}))
    with pytest.raises(ModelError, match="gives its probe the score"):
        open_reward_model(saved_reward, policy, CPU)


def test_an_adapter_that_would_be_on_beside_the_policy_is_caught(open_policy, saved_reward, monkeypatch):
    policy, add_beside = open_policy(lora=NARROW), Policy.add_beside

    def left_on(self: Policy, name: str, config) -> None:
        add_beside(self, name, config)
        self._switch._set([(False, [name]) for _ in self._switch.layers])

    monkeypatch.setattr(Policy, "add_beside", left_on)
    with pytest.raises(ModelError, match="it changes the policy"):
        open_reward_model(saved_reward, policy, CPU)


def test_one_that_cannot_read_text_needs_the_policys_weights(open_policy, new_reward, tmp_path):
    folder = save_reward(tmp_path / "chat", new_reward(), reads_text=False)
    assert open_reward_model(folder, open_policy(), CPU)[0].shared
    with pytest.raises(ModelError, match=r"(?s)chat template's.*weights: found"):
        open_reward_model(folder, open_policy(path=save_tiny_model(tmp_path / "other", seed=1)), CPU)


def test_its_own_base_must_be_the_one_it_was_trained_on(new_reward, tmp_path):
    base = save_tiny_model(tmp_path / "base")
    folder = save_reward(tmp_path / "reward", new_reward(path=base))
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="is no folder here"):
        open_reward_model(folder, None, CPU)
    save_tiny_model(base, seed=1)
    with pytest.raises(ModelError, match=r"(?s)its base is not the one it was trained on.*weights: found"):
        open_reward_model(folder, None, CPU)
    save_tiny_model(base, rms_norm_eps=0.1)
    with pytest.raises(ModelError, match=r"(?s)its base is not the one it was trained on.*rms_norm_eps found 0\.1"):
        open_reward_model(folder, None, CPU)
    save_tiny_model(base)
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")      # of no use to one that reads text
    open_reward_model(folder, None, CPU)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("kltune.json", "{", "kltune.json is not JSON"),
    ("kltune.json", '{"stage": "ppo"}', "kltune.json: reference is missing"),
    ("kltune.json", "[]", "found \\[\\], wanted a valid dictionary"),
    (HEAD, "junk", "cannot be read"),
])
def test_a_damaged_folder_is_named(open_policy, saved_reward, file, content, message):
    (saved_reward / file).write_text(content)
    with pytest.raises(ModelError, match=message):
        open_reward_model(saved_reward, open_policy(), CPU)


@pytest.mark.parametrize("head", [
    {"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, {"weight": torch.zeros(1, 32)},
    {"weight": torch.full((1, 32), torch.nan), "bias": torch.zeros(1)},
])
def test_a_head_that_does_not_fit_or_is_not_finite_is_refused(new_reward, saved_reward, head):
    save_file(head, saved_reward / HEAD)
    with pytest.raises(ModelError, match=r"wanted a weight|NaN"):
        new_reward().load_head(saved_reward)


def test_it_reads_prompt_and_response(saved_reward):
    with pytest.raises(ScorerError, match="found input: response, wanted prompt_response"):
        load_scorer([ModelReward(kind="model", path=str(saved_reward), input="response")], saved_reward, CPU)


def test_the_frozen_weights_are_the_base_to_the_last_bit(new_reward):
    model = new_reward()
    assert model.policy.frozen_sha256() == model.policy.fingerprint.sha256
    assert model.adapter == POLICY
    assert weights_sha256(model.policy._reference_tensors) == model.policy.fingerprint.sha256
