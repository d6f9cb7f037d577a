"""The other side of the parts in ``bench_peers.py``: what people write with transformers and peft, and nothing else.

    python scripts/peers_plain.py sample|ragged|score|eval-kl FOLDER OUTPUT

Two models, ``generate``, and all logits of both at once. Reads what ``peers_kltune.py prepare`` wrote into the folder.
"""

import argparse
import json
from pathlib import Path

import torch
from peers_trl import load_model, load_work
from peers_watch import Watch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer


@torch.no_grad()
def main() -> None:
    """Do one piece of work and write what it gave."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["sample", "ragged", "score", "eval-kl"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    folder, part, watch = arguments.folder, arguments.work, Watch()
    work = load_work(folder)
    asked, answers, ends = (json.loads((folder / f"{name}.json").read_text())
                            for name in ("prompts", "responses", "ends"))
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = PeftModel.from_pretrained(load_model(work), folder / "adapter").eval()
    watch.loaded()      # what follows is the price of two models
    reference = None if part in ("sample", "ragged") else load_model(work).eval()
    prompts = tokenizer.pad({"input_ids": asked[: work.batch]}, return_tensors="pt")
    width = prompts["input_ids"].shape[1]
    policy.generation_config.eos_token_id = ends or None

    def generated() -> Tensor:
        return policy.generate(
            **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=work.new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )

    def kl(rows: Tensor) -> float:
        mask = torch.cat([prompts["attention_mask"], torch.ones_like(rows[:, width:])], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        ours, theirs = (
            model(input_ids=rows, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1].float()
            .log_softmax(-1) for model in (policy, reference)
        )
        return (ours.exp() * (ours - theirs)).sum(-1).sum(1).mean().item()

    given = torch.cat([prompts["input_ids"], torch.tensor(answers)], dim=1)

    def once() -> dict[str, float]:
        if part == "score":
            return {"kl": kl(given)}
        rows = generated()
        if part == "eval-kl":
            return {"sampled_kl": kl(rows)}
        ended = torch.isin(rows[:, width:], torch.tensor(ends or [-1]))
        lengths = torch.where(ended.any(1), ended.long().argmax(1) + 1, work.new_tokens)
        return {"tokens": float(lengths.sum())}

    watch.stamp()
    for _ in range(work.steps):
        watch.values = once()
        watch.stamp()
    watch.write(arguments.output)


if __name__ == "__main__":
    main()
