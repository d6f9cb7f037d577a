"""A small AI judge for the tiny world: ``kltune sft`` teaches the tiny model to answer kltune's own questions.

It answers by the rule of recipes/tiny/rewards.py, so that what it says can be held against the truth: 5 points, one
more for each praise word, one less for each blame word; of two reviews the one with more points is better. No rubric
means anything to it. Scores it learns well (correlation with the rule 0.84 to 0.96 on held-out reviews), preferences
poorly (62 to 78 % right, where always saying "A" would have half). scripts/serve_judge.py calls this and serves it.
"""

import json
import random
import runpy
import shutil
from pathlib import Path

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from kltune.demo.grammar import Review, loose_review, reviews
from kltune.lm.rewards.chat_endpoint import Endpoint
from kltune.lm.rewards.judge import Judge
from kltune.lm.rewards.verdicts import read_preference, read_score
from kltune.recipe import JudgeReward, load_recipe
from kltune.stages.sft import run_sft

CONTEXT = 512                                   # tokens: rubric, two reviews and what kltune says around them
ROWS, STEPS, BATCH = 8000, 400, 16
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role + '\n' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
LETTERS = {1.0: "A", 0.5: "tie", 0.0: "B"}
praise_less_blame = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "tiny" / "rewards.py"))["score"]


def number(response: str) -> int:
    """The rule, from 0 to 10."""
    return round(5 + praise_less_blame([""], [response])[0])


def questions(judge: Judge, count: int, *, held_out: bool) -> list[tuple[str, str, float]]:
    """Mode, question and the rule's answer: a number, or 1, ½ or 0 for A, tie or B; every other one is a pair.

    Every number is as frequent as the others, or always the middle one would do.
    """
    rng, by_number = random.Random(f"judge/{held_out}"), dict[int, list[Review]]()
    for review in reviews(loose_review, 4 * ROWS if not held_out else 4 * count, seed=1, held_out=held_out):
        by_number.setdefault(number(review.response), []).append(review)
    numbers, drawn = sorted(by_number), []
    for place in range(count):
        one, two = (rng.choice(by_number[rng.choice(numbers)]) for _ in range(2))
        first, second = number(one.response), number(two.response)
        if place % 2:
            question = judge.pair_question(one.prompt, one.response, two.response)
            drawn.append(("pair", question, 0.5 + 0.5 * float(np.sign(first - second))))
        else:
            drawn.append(("score", judge.score_question(one.prompt, one.response), float(first)))
    return drawn


def train_judge(folder: Path, judge: Judge) -> None:
    """Make ``folder/judge`` out of the tiny model in ``folder/model``; an interrupted training goes on."""
    base = folder / "judge_base"
    shutil.copytree(folder / "model", base, dirs_exist_ok=True)
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config.max_position_embeddings = tokenizer.model_max_length = CONTEXT   # rotary: no weight depends on it
    tokenizer.chat_template = TEMPLATE
    config.save_pretrained(base)
    tokenizer.save_pretrained(base)
    with open(folder / "judge_rows.jsonl", "w", encoding="utf-8") as file:
        for mode, question, wanted in questions(judge, ROWS, held_out=False):
            answer = {"score": int(wanted)} if mode == "score" else {"better": LETTERS[wanted]}
            messages = [("user", question), ("assistant", json.dumps(answer))]
            row = {"messages": [{"role": role, "content": content} for role, content in messages]}
            file.write(json.dumps(row) + "\n")
    recipe = {
        "stage": "sft", "model": {"path": "judge_base"}, "lora": None,
        "data": {"texts": "judge_rows.jsonl", "max_response_tokens": 32, "on_overlong": "error"},
        "optim": {"lr": 2e-3, "batch_size": BATCH, "warmup_steps": 20},
        "run": {"steps": STEPS, "save_every": 100, "keep": 1, "output": "runs/judge"},
    }
    file = folder / "judge.yaml"
    file.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")  # JSON is YAML
    final = run_sft(load_recipe(file, stage="sft"), resume=True)["final"]
    shutil.copytree(final, folder / "judge_copy", dirs_exist_ok=True)
    (folder / "judge_copy").rename(folder / "judge")


def measured(entry: JudgeReward, count: int) -> tuple[float, float, float]:
    """What an endpoint's answers to held-out questions are worth.

    Returns:
        The share that can be read; of those the correlation of scores with the rule, and the share of preferences that
        are the rule's, where that has one.
    """
    endpoint, scores, right, unread = Endpoint(entry), [], [], 0
    for mode, question, wanted in questions(Judge(entry, "judge"), count, held_out=True):
        text = endpoint.ask([{"role": "user", "content": question}])
        found = read_score(text, entry.lowest, entry.highest) if mode == "score" else read_preference(text)
        if found is None:
            unread += 1
        elif mode == "score":
            scores.append((found, wanted))
        elif wanted != 0.5:
            right.append(found == wanted)
    return 1.0 - unread / count, float(np.corrcoef(np.transpose(scores))[0, 1]), float(np.mean(right))
