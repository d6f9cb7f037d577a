"""``kltune distill``: nearer to a teacher, at a KL from the reference that is held."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from kltune.cli.output import result_text
from kltune.errors import DataError, ModelError, RecipeError, ServerError
from kltune.lm.measure import server
from kltune.lm.model.opening import load_saved_policy
from kltune.recipe import Recipe
from kltune.report.pages import write_page
from kltune.stages.distill import run_distill
from tests.oracles import TinyLM, kl, tiny_adapter, tiny_reference_logits
from tests.servers import StandIn, standing_in
from tests.stages.conftest import letter_tokenizer, ran, rows_of, small_llama, write_rows
from tests.stages.test_oracles import RESPONSES, RHO, spoken

TEACHER = tiny_reference_logits() + 1.4 * torch.cos(2.0 * torch.arange(7)[:, None] + torch.arange(3)).double()
TAUGHT = RESPONSES.probabilities(TEACHER)
PRICE = 0.5
MIXTURE = TAUGHT ** (1 / (1 + PRICE)) * RHO ** (PRICE / (1 + PRICE))
MIXTURE = MIXTURE / MIXTURE.sum()


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory, tiny_lm_folder: Path) -> Path:
    """A LoRA on TinyLM's head whose fifteen responses can be listed."""
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    tiny_adapter(TinyLM.from_pretrained(tiny_lm_folder), TEACHER.float()).save_pretrained(
        folder, save_embedding_layers=False
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny_lm_folder)}))
    return folder


def final(recipe: Recipe, result: dict) -> torch.Tensor:
    """P(y) of each of TinyLM's responses under what a run saved. [15]"""
    return spoken(load_saved_policy(
        Path(result["final"]), recipe.model, device=torch.device("cpu"), is_adapter=True
    ))


def on_tiny(tiny_distill, teacher: Path, *keys: str) -> tuple[torch.Tensor, dict]:
    recipe = tiny_distill(
        f"distill.teacher={teacher}", "distill.teacher_prompt=null", f"kl.beta={PRICE}", "optim.lr=0.1", "run.steps=40",
        *keys,
    )
    result, _ = ran(recipe)
    return final(recipe, result), result


def test_it_ends_at_the_mixture_of_teacher_and_reference(tiny_distill, tiny_teacher):
    found, result = on_tiny(tiny_distill, tiny_teacher)
    assert kl(found, MIXTURE) < 1e-4
    assert kl(found, RHO) == pytest.approx(kl(MIXTURE, RHO), rel=0.02)
    assert result["teacher_kl"] == pytest.approx(kl(MIXTURE, TAUGHT), rel=0.15)       # on 256 responses
    assert result["reference_teacher_kl"] == pytest.approx(kl(RHO, TAUGHT), rel=0.15)


@pytest.fixture
def served_teacher(tiny_lm_folder, tiny_teacher, monkeypatch):
    """A context: the teacher behind a server with some switches."""
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.0)
    model = PeftModel.from_pretrained(TinyLM.from_pretrained(tiny_lm_folder), tiny_teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm_folder)
    return lambda **switches: standing_in(StandIn(model, tokenizer, **switches))


def test_a_served_teacher_is_learnt_from_its_likeliest_tokens_and_the_one_that_was_said(tiny_distill, served_teacher):
    with served_teacher() as standing:
        keys = ("distill.teacher_logprobs=2", "distill.epochs=2", "sampling.responses_per_prompt=96", "run.steps=20",
                "eval.responses=96")
        found, result = on_tiny(tiny_distill, standing.url, *keys)
    assert kl(found, MIXTURE) < 3e-3
    assert result["teacher_kl"] == pytest.approx(kl(found, TAUGHT), abs=0.12)
    assert result["reference_teacher_kl"] == pytest.approx(kl(RHO, TAUGHT), abs=0.12)
    assert {body["prompt_logprobs"] for body in standing.asked} == {2}


@pytest.mark.parametrize(("switches", "kind", "said"), [
    ({"other_words": True}, ModelError, "ids mean other tokens there; .*and in .*tiny"),
    ({"vocabulary": 2}, ModelError, r"server m: .*HTTP 400.*whole vocabulary of .*tiny_lm"),
    ({"scores": False}, ModelError, "it gives no log-probs of a prompt"),
    ({"fails": [503] * 99}, ServerError, "no answer in 4 tries; the last: HTTP 503"),
])
def test_a_served_teacher_that_cannot_teach_is_named(tiny_distill, served_teacher, switches, kind, said):
    with served_teacher(**switches) as standing, pytest.raises(kind, match=said) as raised:
        on_tiny(tiny_distill, standing.url, "distill.teacher_logprobs=2", "run.steps=1")
    assert raised.value.exit_code == (75 if kind is ServerError else 5)


def test_a_served_teacher_that_is_gone_is_waited_for_by_resume(tiny_distill, served_teacher):
    keys = ("distill.teacher_prompt=null", "run.steps=2", "run.save_every=1")
    with served_teacher() as standing:
        recipe = tiny_distill(f"distill.teacher={standing.url}", *keys)
        answer = standing.complete

        def until_a_step_is_made(body):
            assert not list(Path(recipe.run.output).glob("checkpoints/step-*"))     # hangs up
            return answer(body)

        standing.complete = until_a_step_is_made
        with pytest.raises(ServerError, match=r"distill\.teacher: .*no answer.*--resume goes on after step 1"):
            run_distill(recipe, resume=False)
        standing.complete = answer
        assert run_distill(recipe, resume=True)["status"] == "finished"


def test_tokens_on_their_own_end_elsewhere(tiny_distill, tiny_teacher):
    found, _ = on_tiny(tiny_distill, tiny_teacher, "distill.horizon=token", "run.steps=30")
    assert kl(found, MIXTURE) > 4e-4


def test_without_a_price_it_becomes_the_teacher(tiny_distill, tiny_teacher):
    found, _ = on_tiny(tiny_distill, tiny_teacher, "kl.beta=0", "run.steps=20")
    assert kl(found, TAUGHT) < 1e-4


def test_a_target_is_held_between_the_two(distill_recipe, run_folder):
    keys = (f"distill.teacher={run_folder}", "distill.teacher_prompt=null", "kl.target=0.6", "run.steps=24")
    more = ("sampling.prompts_per_step=24", "data.prompts=many.jsonl", "eval.prompts=many.jsonl", "eval.responses=130")
    result, rows = ran(distill_recipe(*keys, *more))
    assert rows[0]["kl/teacher_nats_per_response"] > 1.5 * rows[-1]["kl/teacher_nats_per_response"]
    assert result["kl"]["nats_per_response"] == pytest.approx(0.6, rel=0.25)
    assert 0.0 < result["teacher_kl"] < 0.7 * result["reference_teacher_kl"]
    assert 0.0 < rows[-1]["kl/beta"] < 5.0


def first_row(distill_recipe, teacher: Path, *keys: str) -> dict:
    recipe = distill_recipe(f"distill.teacher={teacher}", "distill.teacher_prompt=null", "run.steps=1", *keys)
    return ran(recipe)[1][0]


def test_an_adapter_beside_the_policy_is_the_model_that_it_makes(distill_recipe, run_folder, llama, tmp_path, capsys):
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), run_folder / "final")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    letter_tokenizer().save_pretrained(tmp_path / "merged")
    foreign = tmp_path / "foreign"
    shutil.copytree(run_folder / "final", foreign, ignore=shutil.ignore_patterns("kltune.json", "manifest.json"))
    config = json.loads((foreign / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(llama)}
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    found, notes = {}, {}
    for name, teacher, *keys in (
        ("beside", run_folder), ("on other layers", run_folder, "lora.targets=[q_proj]"), ("foreign", foreign),
        ("merged", tmp_path / "merged"), ("in bfloat16", tmp_path / "merged", "distill.teacher_dtype=bfloat16"),
    ):
        shutil.rmtree(tmp_path / "distill" / "run", ignore_errors=True)
        capsys.readouterr()
        found[name] = first_row(distill_recipe, teacher, *keys)["kl/teacher_nats_per_response"]
        notes[name] = capsys.readouterr().err
    exact = [found[name] for name in ("on other layers", "foreign", "merged")]
    assert exact == pytest.approx([found["beside"]] * 3, rel=1e-4)
    assert found["in bfloat16"] == pytest.approx(found["beside"], rel=0.1)
    assert found["in bfloat16"] != found["merged"]
    assert all("one more adapter on the policy's weights" in notes[name] for name in ("beside", "foreign"))
    assert "with weights of its own" in notes["merged"]


def test_the_same_weights_asked_in_other_words_are_another_teacher(distill_recipe, tmp_path):
    recipe = distill_recipe("distill.teacher_prompt='{hint} {prompt}'", "data.prompts=hinted.jsonl",
                            "eval.prompts=hinted.jsonl", "run.steps=20", "kl.target=0.5", "optim.lr=0.03")
    rows = [{"prompt": text, "hint": "zazaza"} for text in ("oh", "we ", "my", "in")]
    write_rows(tmp_path / "distill" / "hinted.jsonl", rows)
    result, rows = ran(recipe)
    assert rows[0]["kl/teacher_nats_per_response"] > 0.05
    assert result["teacher_kl"] < 0.8 * result["reference_teacher_kl"]


def test_the_model_itself_is_the_reference(distill_recipe, llama, capsys):
    first_row(distill_recipe, llama, "distill.teacher_prompt=oh {prompt}")
    assert "the policy's own frozen weights" in capsys.readouterr().err


def test_another_vocabulary_is_refused_and_both_are_named(distill_recipe, bandit, llama, tmp_path):
    with pytest.raises(ModelError, match="another vocabulary") as caught:
        first_row(distill_recipe, bandit)
    assert all(str(model) in str(caught.value) for model in (bandit, llama))
    assert caught.value.exit_code == 5
    small_llama(40).save_pretrained(tmp_path / "padded")
    letter_tokenizer().save_pretrained(tmp_path / "padded")
    shutil.rmtree(tmp_path / "distill" / "run")
    with pytest.raises(ModelError, match="logits for 40 tokens"):
        first_row(distill_recipe, tmp_path / "padded")


def test_a_row_without_the_field_is_named(distill_recipe):
    with pytest.raises(DataError, match=r"held_out.jsonl:1: .*no field 'hint'"):
        ran(distill_recipe("distill.teacher_prompt='{hint} {prompt}'"))


@pytest.mark.parametrize(("keys", "said"), [
    (("distill.teacher_prompt=null",), "from which nothing is to be learnt"),
    (("distill.teacher_prompt='{prompt.ids}'",), "wanted the name of a field"),
    (("distill.teacher_prompt='{prompt'",), "do not pair"),
    (("distill.teacher=http://localhost:8000/v1",), "wanted a server's address and model"),
    (("distill.teacher=http://192.0.2.1/v1#big",), "over http whoever listens"),
    (("distill.teacher=http://localhost:8000/v1#big", "sampling.temperature=0.7"), "wanted 1: a server gives"),
    (("distill.teacher=http://localhost:8000/v1#big", "distill.teacher_dtype=float32"), "weights that are here"),
    (("distill.teacher_logprobs=5",), "read only with a served teacher"),
    (("kl.exact=false",), "exact KL only"),
    (("kl.placement=reward",), r"kl\.placement"),
    (("sampling.missing_end_penalty=1",), "nothing scores"),
])
def test_what_a_recipe_cannot_ask_for(distill_recipe, keys, said):
    with pytest.raises(RecipeError, match=said):
        distill_recipe(*keys)


def test_the_teacher_may_not_change_under_a_run(distill_recipe, run_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(run_folder / "final", teacher)
    recipe = distill_recipe(f"distill.teacher={teacher}", "distill.teacher_prompt=null", "run.steps=1")
    ran(recipe)
    (teacher / "adapter_config.json").write_text((teacher / "adapter_config.json").read_text() + "\n")
    with pytest.raises(ModelError, match=r"distill\.teacher.* has changed"):
        ran(recipe)
    assert len(rows_of(recipe)) == 1


def test_what_it_saves_is_measured_and_shown_like_any_other(distill_recipe, eval_kl, tmp_path):
    result, rows = ran(distill_recipe("run.steps=3"))
    code, document, _ = eval_kl(result["output"], "--responses", 20)
    assert code == 0
    assert document["kl"]["exact"]["nats_per_response"] > 0.0
    page = write_page(Path(result["output"])).read_text(encoding="utf-8")
    assert "KL to the teacher" in page
    assert "KL(policy‖teacher)" in result_text(result)
    assert result["score"] is None
    assert all("nonfinite" not in row for row in rows)
