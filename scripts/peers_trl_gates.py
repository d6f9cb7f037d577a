"""TRL's side of the gates of ``bench_peers.py``: log-probabilities, one gradient, values of losses.

    python scripts/peers_trl_gates.py gate|gate-ppo FOLDER OUTPUT
"""

import argparse
import json
import logging
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from peers_trl import arguments_of, dpo_trainer, load_model, load_work, lora_config, put_adapter
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer


def alternating(rows: Tensor) -> Tensor:
    """TRL's batch is all chosen, then all rejected; here they take turns, pair by pair."""
    return torch.stack(rows.chunk(2), dim=1).flatten(0, 1)


def gate(folder: Path, output: Path) -> None:
    """Log-probabilities, one gradient and the value of each loss on the gate's pairs."""
    work = load_work(folder)
    rows = json.loads((folder / "pairs.json").read_text())
    plain = arguments_of(work, "matched", folder) | {"beta": work.beta, "max_length": None}

    def made(**options):
        return dpo_trainer(work, folder / "adapter", rows, **(plain | options))

    def value(trainer, some=rows) -> float:
        return trainer.compute_loss(trainer.model, trainer.data_collator(some)).item()

    trainer = made()
    batch = trainer.data_collator(rows)
    mask = alternating(batch["completion_mask"][:, 1:]).bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)

    def logprobs() -> Tensor:
        return alternating(trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs.detach())

    tensors = {"logprobs": logprobs()[mask]}
    with trainer.model.disable_adapter():
        tensors["ref_logprobs"] = logprobs()[mask]
    trainer.compute_loss(trainer.model, batch).backward()
    tensors |= {f"gradient/{n}": p.grad for n, p in trainer.model.named_parameters() if p.requires_grad}
    found, known = {"sigmoid": value(trainer)}, {}
    if work.losses:
        found |= more_losses(work, folder, rows, made, value) | reference_free(work, trainer, inputs, labels)
        whole = json.loads((folder / "whole.json").read_text())
        own = trainer_tokens(work, folder)
        differing = sum(mine != {name: theirs[name] for name in mine} for mine, theirs in zip(whole, own, strict=True))
        known = {"pairs": len(rows), "otherwise": differing}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output.with_suffix(".safetensors"))
    output.write_text(json.dumps({"losses": found} | known))


def more_losses(work: SimpleNamespace, folder: Path, rows: list[dict], made, value) -> dict[str, float]:
    """The value of each other loss with a reference, by kltune's name for it."""
    smoothing = {"label_smoothing": work.label_smoothing}
    smoothed = made(loss_type=["aot"], **smoothing)
    return {
        "sigmoid, label smoothing": sum(value(smoothed, [row]) for row in rows) / len(rows),
        "robust": value(made(loss_type=["robust"], **smoothing)),
        "hinge": value(made(loss_type=["hinge"])),
        "ipo": value(made(loss_type=["ipo"])),
        "bco": value(made(loss_type=["bco_pair"])),
        "f_dpo forward_kl": value(made(f_divergence_type="forward_kl")),
        "f_dpo js": value(made(f_divergence_type="js_divergence")),
        "f_dpo alpha": value(made(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=work.alpha)),
        "kto": kto_value(work, folder),
    }


def trainer_tokens(work: SimpleNamespace, folder: Path) -> list[dict]:
    """What TRL's own preparation makes of the raw rows: where a prompt ends, and how it becomes tokens."""
    from trl import DPOConfig, DPOTrainer

    raw = [json.loads(line) for line in (folder / "raw.jsonl").read_text().splitlines()]
    trainer = DPOTrainer(
        model=load_model(work), train_dataset=Dataset.from_list(raw), peft_config=lora_config(folder / "adapter"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        args=DPOConfig(**arguments_of(work, "matched", folder), max_length=None),
    )
    return list(trainer.train_dataset)


def kto_value(work: SimpleNamespace, folder: Path) -> float:
    """KTOTrainer's loss; the mismatched responses of its KL are given, not paired by TRL."""
    from trl import KTOConfig, KTOTrainer

    class OnTokenIds(KTOTrainer):
        """Takes the token ids as they are."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    rows = json.loads((folder / "labelled.json").read_text())
    trainer = OnTokenIds(
        model=load_model(work), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work.model), peft_config=lora_config(folder / "adapter"),
        args=KTOConfig(
            beta=work.beta, max_length=None, per_device_train_batch_size=len(rows),
            **arguments_of(work, "matched", folder),
        ),
    )
    put_adapter(trainer.model, folder / "adapter")
    return trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()


def reference_free(work: SimpleNamespace, trainer, inputs: dict, labels: Tensor) -> dict[str, float]:
    """SimPO and ORPO's odds-ratio term: TRL's own functions on the means per token that it makes of its logits."""
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    logits = trainer.model(**inputs).logits.detach()
    chosen, rejected = CPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
    settings = SimpleNamespace(
        alpha=0.0, loss_type="simpo", beta=work.simpo_beta, simpo_gamma=work.simpo_gap, label_smoothing=0.0,
        accelerator=trainer.accelerator,
    )
    simpo = CPOTrainer.cpo_loss(settings, chosen, rejected)[0]
    settings = SimpleNamespace(beta=work.beta, accelerator=trainer.accelerator)
    odds = ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)[0]
    return {"simpo": simpo.mean().item(), "orpo, odds ratio": -odds.mean().item()}


def gate_ppo(folder: Path, output: Path) -> None:
    """Log-probabilities of the gate's responses as the PPOTrainer of TRL 1.12 computes them."""
    from trl.experimental.ppo.ppo_trainer import forward
    from trl.trainer.utils import selective_log_softmax

    work = load_work(folder)
    model = PeftModel.from_pretrained(load_model(work), folder / "adapter").eval()
    pad = AutoTokenizer.from_pretrained(work.model).pad_token_id
    found = []
    for row in json.loads((folder / "pairs.json").read_text()):
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                logits = forward(model, ids, pad).logits[:, len(row["prompt_ids"]) - 1 : -1]
            found.append(selective_log_softmax(logits, ids[:, len(row["prompt_ids"]) :])[0])
    save_file({"logprobs": torch.cat(found)}, output.with_suffix(".safetensors"))
    output.write_text(json.dumps({}))


def main() -> None:
    """Compute one side of the gates and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["gate", "gate-ppo"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    {"gate": gate, "gate-ppo": gate_ppo}[arguments.work](arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
