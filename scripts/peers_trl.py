"""TRL's side of ``bench_peers.py``; runs in an environment of TRL's own and knows nothing of kltune.

    python scripts/peers_trl.py dpo|sft|reward|ppo|grpo|rloo FOLDER OUTPUT [--settings SETTINGS]

Reads what ``peers_kltune.py prepare`` wrote into the folder: base weights, initial adapter, token ids in their order,
sizes. ``matched`` sets what the two tools can be given alike, ``defaults`` nothing but the sizes and the type of the
weights, ``untouched`` not even that.
"""

import argparse
import importlib.util
import json
import logging
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peers_watch import SETTINGS, Watch
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


def load_work(folder: Path) -> SimpleNamespace:
    """The sizes of the work and its data."""
    return SimpleNamespace(**json.loads((folder / "work.json").read_text()))


def load_model(work: SimpleNamespace, kind=AutoModelForCausalLM, **options) -> nn.Module:
    """The base weights in the work's type."""
    return kind.from_pretrained(work.model, dtype=getattr(torch, work.dtype), **options)


def lora_config(folder: Path) -> PeftConfig:
    """The adapter's own configuration, to be trained."""
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def put_adapter(model: PeftModel, folder: Path, **more: Tensor) -> None:
    """Give a wrapped model the saved initial tensors, and more by name, in place of its own random ones."""
    more = {f"base_model.model.{name}.weight": tensor for name, tensor in more.items()}
    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors") | more)


def score_function(folder: Path):
    """``score(prompts, responses)`` of the folder's rewards.py: the very function that kltune calls."""
    spec = importlib.util.spec_from_file_location("rewards", folder / "rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score


class Rule(nn.Module):
    """A reward function in the shape of TRL's reward model, whose backbone gives hidden states and whose head scores.

    The backbone decodes the response, which is the last ``new_tokens`` columns, and calls the function on its text.
    """

    base_model_prefix = "backbone"

    def __init__(self, score, tokenizer, new_tokens: int):
        super().__init__()
        self._function, self._tokenizer, self._new_tokens = score, tokenizer, new_tokens

    def backbone(self, input_ids: Tensor, **_) -> SimpleNamespace:
        """The score of each response at every position, as one hidden state. [B, S] -> [B, S, 1]"""
        texts = self._tokenizer.batch_decode(input_ids[:, -self._new_tokens :], skip_special_tokens=True)
        scores = torch.tensor(self._function([""] * len(texts), texts), dtype=torch.float32)
        return SimpleNamespace(hidden_states=[scores[:, None, None].expand(-1, input_ids.shape[1], 1)])

    def score(self, hidden: Tensor) -> Tensor:
        """Nothing left to do."""
        return hidden


class Stamps(TrainerCallback):
    """Tells the watch when steps end."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def on_train_begin(self, *_, **__):
        """The first step begins."""
        self.watch.stamp()

    def on_step_end(self, *_, **__):
        """A step is over."""
        self.watch.stamp()


def arguments_of(work: SimpleNamespace, settings: str, folder: Path) -> dict:
    """TrainingArguments: quiet, on the CPU, saving nothing; autocast where untouched; matched: kltune's AdamW."""
    quiet = {
        "output_dir": str(folder / "trl"), "use_cpu": True, "logging_strategy": "no", "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True, "seed": 0,
    }
    if settings == "untouched":
        return quiet
    quiet["bf16"] = False
    if settings == "defaults":
        return quiet
    return quiet | {
        "gradient_checkpointing": False, "optim": "adamw_torch", "learning_rate": work.lr,
        "lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0,
    }


# --- DPO, SFT, reward -----------------------------------------------------------------------------------------------


def on_token_ids(trainer: type, *, prepared: bool) -> type:
    """A trainer that goes through its rows in order; prepared: that takes their token ids as they are."""

    class OnTokenIds(trainer):
        """See ``on_token_ids``."""

        def _prepare_dataset(self, dataset, *arguments, **options):
            return dataset if prepared else super()._prepare_dataset(dataset, *arguments, **options)

        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset if dataset is None else dataset)

    return OnTokenIds


def dpo_trainer(work: SimpleNamespace, adapter: Path, rows: list[dict], **options):
    """A DPOTrainer on rows of token ids, in their order, that starts from the saved adapter."""
    from trl import DPOConfig, DPOTrainer

    watch = options.pop("watch", None)
    model = load_model(work)
    if watch is not None:
        watch.loaded()
    trainer = on_token_ids(DPOTrainer, prepared=True)(
        model=model, args=DPOConfig(**options), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.model), peft_config=lora_config(adapter),
        callbacks=None if watch is None else [Stamps(watch)],
    )
    put_adapter(trainer.model, adapter)
    return trainer


def train_noting_losses(trainer, watch: Watch) -> None:
    """Train, and keep the loss of every step."""
    inner = trainer.compute_loss

    def compute_loss(*arguments, **options):
        loss = inner(*arguments, **options)
        watch.losses.append(loss.item())
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()


def dpo(folder: Path, settings: str, watch: Watch) -> None:
    """Steps of DPOTrainer on the work's pairs."""
    work = load_work(folder)
    rows = json.loads((folder / "pairs.json").read_text())
    train_noting_losses(dpo_trainer(
        work, folder / "adapter", rows, watch=watch, beta=work.beta, max_length=None,
        per_device_train_batch_size=work.batch, max_steps=work.steps, **arguments_of(work, settings, folder),
    ), watch)


def sft(folder: Path, settings: str, watch: Watch) -> None:
    """Steps of SFTTrainer on the work's texts, of which it learns the responses."""
    from trl import SFTConfig, SFTTrainer

    work = load_work(folder)
    model = load_model(work)
    watch.loaded()
    trainer = on_token_ids(SFTTrainer, prepared=False)(
        model=model, train_dataset=Dataset.from_list(json.loads((folder / "texts.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(work.model), peft_config=lora_config(folder / "adapter"),
        callbacks=[Stamps(watch)],
        args=SFTConfig(
            per_device_train_batch_size=work.batch, max_steps=work.steps, max_length=None, completion_only_loss=True,
            **arguments_of(work, settings, folder),
        ),
    )
    put_adapter(trainer.model, folder / "adapter")
    train_noting_losses(trainer, watch)


def reward(folder: Path, settings: str, watch: Watch) -> None:
    """Steps of RewardTrainer on the work's pairs, its head at 0 as kltune's.

    Transformers scores at the last token that is no padding: padded with end tokens, a response would lose its own.
    """
    from trl import RewardConfig, RewardTrainer

    work = load_work(folder)
    model = load_model(work, AutoModelForSequenceClassification, num_labels=1)
    watch.loaded()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    tokenizer.pad_token = tokenizer.bos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    config = lora_config(folder / "adapter")
    config.task_type, config.modules_to_save = "SEQ_CLS", ["score"]
    trainer = on_token_ids(RewardTrainer, prepared=True)(
        model=model, train_dataset=Dataset.from_list(json.loads((folder / "pairs.json").read_text())),
        processing_class=tokenizer, peft_config=config, callbacks=[Stamps(watch)],
        args=RewardConfig(
            per_device_train_batch_size=work.batch, max_steps=work.steps, max_length=None,
            **arguments_of(work, settings, folder),
        ),
    )
    put_adapter(trainer.model, folder / "adapter", score=torch.zeros_like(model.score.weight))
    train_noting_losses(trainer, watch)


# --- PPO (TRL 1.12) and GRPO ----------------------------------------------------------------------------------------


def ppo(folder: Path, settings: str, watch: Watch) -> None:
    """Steps of the PPOTrainer of TRL 1.12; matched: its critic is a LoRA of the same size on weights of its own.

    Minibatches must not be made by gradient accumulation: that PPOTrainer would then take one optimizer step per epoch
    instead of one per minibatch, so the whole batch is "per device".
    """
    import trl.experimental.ppo.ppo_trainer as module
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    work = load_work(folder)
    prompts = json.loads((folder / "prompts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = load_model(work)
    watch.loaded()
    critic = load_model(work, AutoModelForSequenceClassification, num_labels=1)
    matched = {}
    if settings == "matched":
        matched = {"temperature": 1.0, "kl_coef": work.beta, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1}
        critic = inject_adapter_in_model(lora_config(folder / "adapter"), critic)
        critic.score.requires_grad_(True)
    module.batch_generation = watch.timed("generate", module.batch_generation)
    trainer = PPOTrainer(
        args=PPOConfig(
            per_device_train_batch_size=work.batch, gradient_accumulation_steps=1, num_ppo_epochs=work.epochs,
            num_mini_batches=work.minibatches, total_episodes=work.steps * work.batch,
            response_length=work.new_tokens, num_sample_generations=0, **matched,
            **arguments_of(work, settings, folder),
        ),
        processing_class=tokenizer, model=model, ref_model=None, value_model=critic, callbacks=[Stamps(watch)],
        reward_model=Rule(score_function(folder), tokenizer, work.new_tokens),
        peft_config=lora_config(folder / "adapter"),
        train_dataset=Dataset.from_list([{"input_ids": ids} for ids in prompts]), eval_dataset=Dataset.from_list([]),
    )
    put_adapter(trainer.policy_model, folder / "adapter")
    trainer.train()


def grouped(trainer: str, folder: Path, settings: str, watch: Watch) -> None:
    """Steps of GRPOTrainer or RLOOTrainer, one update per batch."""
    import trl

    work = load_work(folder)
    texts = json.loads((folder / "texts.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    if tokenizer(text=texts)["input_ids"] != json.loads((folder / "prompts.json").read_text()):
        raise SystemExit(f"{trainer}: TRL makes other token ids of the prompts than kltune")
    score = score_function(folder)

    def rewards(prompts, completions, **_):
        return score(prompts, completions)

    matched = {"beta": work.beta, "shuffle_dataset": False} if settings == "matched" else {}
    model = load_model(work)
    watch.loaded()
    made = getattr(trl, f"{trainer}Trainer")(
        model=model, reward_funcs=rewards, processing_class=tokenizer, peft_config=lora_config(folder / "adapter"),
        train_dataset=Dataset.from_dict({"prompt": texts}), callbacks=[Stamps(watch)],
        args=getattr(trl, f"{trainer}Config")(
            per_device_train_batch_size=work.batch, num_generations=work.group, max_completion_length=work.new_tokens,
            generation_kwargs={"min_new_tokens": work.new_tokens}, max_steps=work.steps, **matched,
            **arguments_of(work, settings, folder),
        ),
    )
    put_adapter(made.model, folder / "adapter")
    made._generate_single_turn = watch.timed("generate", made._generate_single_turn)
    made.train()


TRAINERS = {
    "dpo": dpo, "sft": sft, "reward": reward, "ppo": ppo,
    "grpo": partial(grouped, "GRPO"), "rloo": partial(grouped, "RLOO"),
}


def main() -> None:
    """Do one piece of work and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=TRAINERS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--settings", choices=SETTINGS, default="matched")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    watch = Watch()
    TRAINERS[arguments.work](arguments.folder, arguments.settings, watch)
    watch.write(arguments.output)


if __name__ == "__main__":
    main()
