"""Whole stages in a second: on a random Llama that speaks letters, and on the listed models of docs/maths.md 22."""

import json
import math
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kltune.cli import main
from kltune.recipe import Recipe, load_recipe
from kltune.run.recorder import Report
from kltune.stages.distill import run_distill
from kltune.stages.dpo import run_dpo
from kltune.stages.ppo import run_ppo
from kltune.stages.reward import run_reward
from kltune.stages.sft import run_sft
from kltune.stages.trpo import run_trpo
from kltune.train.budget import Budget
from kltune.train.evaluation import finish as finishing
from tests.known_metrics import known_only
from tests.oracles import BANDIT_REFERENCE, save_tiny_lm

LETTERS = string.ascii_lowercase + " .,"
SPECIAL = ("<s>", "</s>", "<pad>")
PROMPTS = ("the ", "once a", "what if ", "no", "my cat", "in may ", "oh", "we sat", "he ran", "ten ", "up", "a dog ")
MANY = tuple(f"{a}{b}" for a in "abcdefghijklm" for b in "vwxyz")     # few prompts give wide intervals
HELD_OUT = ("she ", "two by", "if not", "so", "a fish ", "old men", "it was ", "run", "at ten ", "you")

# What the tiny model is taught or scored for. score: a's per response.
REWARDS = '''
def score(prompts, responses):
    """How often a response says a."""
    return [float(response.count("a")) for response in responses]

def few(prompts, responses):
    """An a is good, and more than two are bad."""
    return [float(min(r.count("a"), 2) - 3 * max(r.count("a") - 2, 0)) for r in responses]

def none(prompts, responses):
    """An a is bad."""
    return [-float(response.count("a")) for response in responses]

def flat(prompts, responses):
    """All alike."""
    return [1.0 for _ in responses]

def shifted(prompts, responses):
    """The same, and 50."""
    return [row + 50.0 for row in score(prompts, responses)]

def scaled(prompts, responses):
    """The same in hundredths."""
    return [100.0 * row for row in score(prompts, responses)]

def nan_later(prompts, responses, calls=[]):
    """Finite in the first call only."""
    calls.append(None)
    return [float("nan") if len(calls) > 1 else 0.5 * row for row in range(len(responses))]

def arms(prompts, responses):
    """The bandit's rewards, 0 to 3."""
    return [float("wxyz".index(response.strip())) for response in responses]

def tiny(prompts, responses):
    """TinyLM's reward but for the half point an unfinished response loses."""
    words = ["".join(response.split()) for response in responses]
    return [float(word.count("a") + ("ab" in word)) for word in words]
'''

PPO = {
    "stage": "ppo",
    "lora": {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "v_proj", "down_proj"]},
    "data": {"prompts": "prompts.jsonl"},
    "sampling": {"prompts_per_step": 8, "responses_per_prompt": 2, "max_new_tokens": 6},
    "reward": [{"kind": "function", "path": "rewards.py:score"}],
    "kl": {"target": 0.5},
    "ppo": {"baseline": "value", "epochs": 2, "minibatch_size": 8},
    "optim": {"lr": 0.02},
    "run": {"steps": 4, "save_every": 100, "eval_every": 100},
    "eval": {"prompts": "held_out.jsonl", "responses": 10},
}
TRPO = {
    "stage": "trpo",
    **{name: PPO[name] for name in ("lora", "data", "sampling", "reward", "kl", "run", "eval")},
    "trpo": {"max_step_kl": 0.05, "fisher_fraction": 0.5, "value_minibatch_size": 8},
    "optim": {"lr": 0.02},
}
SFT = {
    "stage": "sft",
    "lora": {"rank": 4, "alpha": 8.0},
    "data": {"texts": "texts.jsonl"},
    "sampling": {"max_new_tokens": 6},
    "optim": {"lr": 0.02, "batch_size": 6},
    "run": {"steps": 4, "save_every": 100, "eval_every": 100},
    "eval": {"prompts": "held_out.jsonl", "responses": 10, "texts": "held_out_texts.jsonl"},
}
REWARD = {
    "stage": "reward",
    "lora": {"rank": 4, "alpha": 8.0},
    "data": {"pairs": "judged.jsonl"},
    "optim": {"lr": 0.02, "batch_size": 6},
    "run": {"steps": 4, "save_every": 100, "eval_every": 100},
    "eval": {"pairs_share": 0.25},
}
DPO = {
    "stage": "dpo",
    **{name: PPO[name] for name in ("lora", "run", "eval")},
    "data": {"pairs": "pairs.jsonl"},
    "sampling": {"prompts_per_step": 12, "max_new_tokens": 6},
    "kl": {"control": "fixed", "beta": 0.0},
    "optim": {"lr": 0.02, "batch_size": 8},
}
ONLINE = DPO | {
    "data": {"prompts": "prompts.jsonl"},
    "sampling": {"prompts_per_step": 12, "responses_per_prompt": 4, "max_new_tokens": 6},
    "reward": PPO["reward"],
    "dpo": {"source": "online"},
    "optim": {"lr": 0.02},
}
DISTILL = {
    "stage": "distill",
    **{name: PPO[name] for name in ("lora", "data", "sampling", "kl", "optim", "run", "eval")},
    "distill": {"teacher": "reference", "teacher_prompt": "a a a {prompt}", "minibatch_size": 8},
}
ORACLE = {
    "stage": "ppo",
    "lora": {"rank": 4, "alpha": 4.0, "targets": ["lm_head"]},
    "data": {"prompts": "prompts.jsonl"},
    "sampling": {"prompts_per_step": 1, "responses_per_prompt": 256},
    "kl": {"control": "fixed", "beta": 1.0},
    "run": {"save_every": 1000, "eval_every": 1000},
    "eval": {"responses": 256},
}
ORACLE_DISTILL = ORACLE | {
    "stage": "distill", "distill": {"teacher": "reference", "teacher_prompt": "{prompt}"},
}
ORACLE_TRPO = ORACLE | {
    "stage": "trpo",
    "trpo": {"baseline": "rloo", "damping": 0.01, "fisher_fraction": 1.0, "cg_iterations": 20},
}

RUNS = {"sft": run_sft, "reward": run_reward, "ppo": run_ppo, "trpo": run_trpo, "dpo": run_dpo, "distill": run_distill}
MakeRecipe = Callable[..., Recipe]
Command = Callable[..., tuple[int, Any, str]]


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, ``<s>`` before every text."""
    ids = {piece: number for number, piece in enumerate((*SPECIAL, *LETTERS))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


def small_llama(vocabulary: int, *, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Random weights, large enough that the next letter depends on the ones before."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.25, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    return model.eval()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama as a folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    small_llama(len(SPECIAL) + len(LETTERS)).save_pretrained(folder)
    letter_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bandit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ORACLE-A as a real Llama: behind the prompt its four arms have the probabilities ρ, all else 0.

    One prompt is one hidden state h, and the head's rows are log ρ(v) · h / |h|².
    """
    folder = tmp_path_factory.mktemp("models") / "bandit"
    ids = {piece: number for number, piece in enumerate((*SPECIAL, *"wxyza"))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = small_llama(len(ids), layers=1)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([[0]])).last_hidden_state[0, -1]
        logits = torch.full((len(ids),), -1e4)
        logits[3:7] = BANDIT_REFERENCE.float().log()
        model.lm_head.weight.copy_(logits[:, None] * hidden / hidden.square().sum())
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ORACLE-B as a folder."""
    return save_tiny_lm(tmp_path_factory.mktemp("models") / "tiny_lm")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_recipe(folder: Path, base: dict[str, Any], model: Path, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """A recipe with its data and rewards in ``folder``; its output is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in prompts])
    write_rows(folder / "held_out.jsonl", [{"prompt": text} for text in HELD_OUT])
    write_rows(folder / "many.jsonl", [{"prompt": text} for text in MANY])
    texts = [{"prompt": text, "response": f"{text[::-1]}a."} for text in PROMPTS]
    write_rows(folder / "texts.jsonl", texts)
    write_rows(folder / "held_out_texts.jsonl", [{"prompt": t, "response": f"{t[::-1]}a."} for t in HELD_OUT])
    pairs = [{"prompt": text, "chosen": "a" + text[::-1], "rejected": text[::-1] + "zz"} for text in prompts]
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "held_out_pairs.jsonl", [{"prompt": t, "chosen": "a.", "rejected": "zz"} for t in HELD_OUT])
    sides = [("ba a.", "zo z."), ("an a", "so, no"), ("a.", "moo.")]
    judged = [{"prompt": text, "chosen": good, "rejected": bad} for text in PROMPTS for good, bad in sides]
    write_rows(folder / "judged.jsonl", judged)
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")
    model_keys = base.get("model", {}) | {"path": str(model)}
    whole = base | {"model": model_keys, "run": base["run"] | {"output": str(folder / "run")}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    return path


def recipe_fixture(name: str, base: dict[str, Any], model: str = "llama", prompts: tuple[str, ...] = PROMPTS) -> Any:
    """A fixture: a function from overrides (and an output) to a recipe on the model that another fixture gives."""

    @pytest.fixture(name=name)
    def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> MakeRecipe:
        folder = tmp_path / name.removesuffix("_recipe")
        path = write_recipe(folder, base, request.getfixturevalue(model), prompts)
        return lambda *overrides, output=None: load_recipe(path, overrides, output=output)

    return fixture


def on_oracle(base: dict[str, Any], reward: str, **sampling: Any) -> dict[str, Any]:
    """A recipe on a listed model, with its own reward."""
    return base | {"reward": [{"kind": "function", "path": f"rewards.py:{reward}"}],
                   "sampling": base["sampling"] | sampling}


ppo_recipe, trpo_recipe = recipe_fixture("ppo_recipe", PPO), recipe_fixture("trpo_recipe", TRPO)
sft_recipe, reward_recipe = recipe_fixture("sft_recipe", SFT), recipe_fixture("reward_recipe", REWARD)
dpo_recipe, online_recipe = recipe_fixture("dpo_recipe", DPO), recipe_fixture("online_recipe", ONLINE)
distill_recipe = recipe_fixture("distill_recipe", DISTILL)
tiny_distill = recipe_fixture("tiny_distill", ORACLE_DISTILL | {
    "sampling": ORACLE["sampling"] | {"max_new_tokens": 3}}, "tiny_lm_folder", ("<s>",))
ARMS = {"reward": "arms", "max_new_tokens": 1}
WORDS = {"reward": "tiny", "max_new_tokens": 3, "missing_end_penalty": 0.5}
bandit_recipe = recipe_fixture("bandit_recipe", on_oracle(ORACLE, **ARMS), "bandit", ("<s>",))
bandit_trpo = recipe_fixture("bandit_trpo", on_oracle(ORACLE_TRPO, **ARMS), "bandit", ("<s>",))
tiny_recipe = recipe_fixture("tiny_recipe", on_oracle(ORACLE, **WORDS), "tiny_lm_folder", ("<s>",))
tiny_trpo = recipe_fixture("tiny_trpo", on_oracle(ORACLE_TRPO, **WORDS), "tiny_lm_folder", ("<s>",))


@pytest.fixture(scope="session")
def reward_model(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A finished reward model on the random Llama that likes an a."""
    path = write_recipe(tmp_path_factory.mktemp("judge"), REWARD, llama)
    with without_page():
        return Path(run_reward(load_recipe(path, ["run.steps=25"]), resume=False)["final"])


def ran(recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run a recipe to its end: its result, and the rows of its metrics.jsonl."""
    return RUNS[recipe.stage](recipe, resume=False), rows_of(recipe)


def rows_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return read_jsonl(Path(recipe.run.output) / "metrics.jsonl")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextmanager
def without_page() -> Iterator[None]:
    """Within: runs leave out report.html, whose drawing takes longer than they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finishing, "write_page", lambda folder: None)
        patch.setattr(Report, "step", known_only(Report.step))
        yield


@pytest.fixture(scope="module", autouse=True)
def _no_page() -> Iterator[None]:
    """``without_page`` everywhere; ``test_ppo`` puts the page back for one run."""
    with without_page():
        yield


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """A finished PPO run on the random Llama, a nat or so away from it."""
    path = write_recipe(tmp_path_factory.mktemp("trained"), PPO, llama)
    with without_page():
        return Path(run_ppo(load_recipe(path, ["kl.target=2", "run.steps=8"]), resume=False)["output"])


@pytest.fixture
def unlimited(monkeypatch):
    """Steps are as long as their learning rate makes them, so that a few of them pass a cap."""
    monkeypatch.setattr(Budget, "room", lambda *_, **__: math.inf)


@pytest.fixture
def command(capsys: pytest.CaptureFixture) -> Command:
    """``kltune ... --json`` in this process: exit code, document (without --json its text), stderr."""

    def call(*arguments: object, as_json: bool = True) -> tuple[int, Any, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments), *(["--json"] if as_json else [])])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return caught.value.code, json.loads(out) if as_json and out else out, err

    return call


@pytest.fixture
def eval_kl(command: Command) -> Command:
    """``kltune eval-kl ...``, likewise."""
    return partial(command, "eval-kl")
