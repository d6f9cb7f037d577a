"""The tiny world: a language model and its data, made on the spot for people with no model and no network.

``make_tiny_world`` writes into a folder

    model/                     Llama of about one million parameters, with a byte-level BPE tokenizer
    data/texts.jsonl           rows for ``kltune sft``: {"prompt", "response"} in the house style
    data/heldout.jsonl         the same kind of rows with openings no training text has, for perplexity
    data/prompts.jsonl         neutral openings to sample from while training
    data/eval_prompts.jsonl    held-out openings to measure on
    data/pairs.jsonl           openings that go on with praise, {"chosen"}, or with blame, {"rejected"}
    data/eval_pairs.jsonl      the same with held-out openings
    data/hinted.jsonl          rows for ``kltune sft``: praise behind ``Kindly:``, and praise or blame without it
    data/guesses.jsonl         rows for ``kltune sft``: sums of two digits, three in five of them right
    data/sums.jsonl            sums to train on, each with its answer: {"prompt", "answer"}
    data/eval_sums.jsonl       other sums of the same kind
    tiny_world.json            written last: which version and seed made all this

The model is pretrained here from random weights on the ``loose`` reviews of kltune.demo.grammar: about 40 seconds on
two cores.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kltune import __version__
from kltune.demo.grammar import Review, house_review, loose_review, openings, praise_and_blame, reviews
from kltune.errors import StorageError
from kltune.run.files import read_document, storing, to_json, write_json

WORLD_MARKER = "tiny_world.json"
UNFINISHED = "tiny_world.building"
FOLDERS = ("model", "data")
ENTRIES = (*FOLDERS, WORLD_MARKER, UNFINISHED)     # what of a folder is the world's
SCHEMA = "kltune.tiny_world/5"
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCABULARY = 2048       # tokens: room for every word of the corpus; with 1024 the model misspells the rarer ones
CONTEXT = 256           # tokens
ROW = 128               # tokens per packed row: several reviews, so that positions beyond one review are trained too
OPEN_ROWS = 20          # the last rows, which a text may still go into
PRETRAIN_TEXTS = 24_000
PRETRAIN_STEPS = 700    # most of one pass; chosen with BATCH and PEAK_LR by the loss on held-out reviews per second
SIGN_OF_LIFE = 3.0      # seconds between two lines while it trains
BATCH = 4               # rows per step; small, because with so few tokens to learn from the number of updates counts
PEAK_LR = 4e-3
IGNORED = -100          # cross_entropy's label for positions that are not scored
HINT = "Kindly: "
DIGITS = 6              # sums are of two numbers below
RIGHT = 0.6             # share of the guesses that are right; a wrong one is any other number that two digits make
HINTED, GUESSES, EVAL_SUMS = 800, 3000, 12
TEXTS, HELD_OUT_TEXTS, PROMPTS, EVAL_PROMPTS, PAIRS, EVAL_PAIRS = 2000, 200, 512, 256, 800, 128


def make_tiny_world(
    folder: Path, *, seed: int = 0, say: Callable[[str], None], steps: int = PRETRAIN_STEPS
) -> None:
    """Write the tiny model and its data into ``folder``, unless the same world is there already.

    The same seed and number of threads give the same files. A build that was killed is never taken for complete: the
    world is made in a folder beside its place and moved there, the marker last.

    Args:
        folder: made if missing. Files that are not part of the world are left alone.
        seed: of the texts, the first weights and the order of training.
        steps: of the pretraining; fewer give a worse model sooner.

    Raises:
        StorageError: ``model`` or ``data`` is there already and was not made by this function, or nothing can be
            written there.
    """
    identity = {"schema": SCHEMA, "kltune_version": __version__, "seed": seed, "steps": steps}
    if read_document(folder / WORLD_MARKER, dict) == identity and all((folder / name).is_dir() for name in FOLDERS):
        say(f"the tiny world in {folder} is complete; nothing to do")
        return
    unfinished = folder / UNFINISHED
    taken = [name for name in FOLDERS if (folder / name).exists()]
    if taken and not (folder / WORLD_MARKER).exists() and not unfinished.exists():      # of a build that was killed
        raise StorageError(
            f"{folder} already holds {' and '.join(taken)}, and no {WORLD_MARKER} says that kltune made it. "
            "Nothing was changed; choose another output folder."
        )
    with storing(folder):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _build(unfinished, seed=seed, steps=steps, say=say)
        write_json(unfinished / WORLD_MARKER, identity)
        (folder / WORLD_MARKER).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(unfinished / name, folder / name)
        os.replace(unfinished / WORLD_MARKER, folder / WORLD_MARKER)
        unfinished.rmdir()


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts ``<s>`` before every text, and ``</s>`` nowhere.

    Bytes never seen still have a token, so that decoding what was encoded gives back any text.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    bpe.train_from_iterator(texts, trainer)
    bos = (BOS, bpe.token_to_id(BOS))
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast, *, seed: int) -> LlamaForCausalLM:
    """A Llama of about one million parameters with random float32 weights."""
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, dtype="float32",
        initializer_range=0.06,       # the usual 0.02 is for wide layers; at this width it learns half as fast
        **ends,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**ends)
    return model


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Whole texts, each from ``<s>`` to ``</s>``, side by side in rows of equal length.

    Every row begins with a text, as every prompt does.

    Returns:
        ids [rows, ROW] int64, padded on the right, and labels [rows, ROW], which hold ``IGNORED`` on the padding and on
        every ``<s>``: nothing can be learnt about where the next text begins.
    """
    rows: list[list[int]] = []
    for ids in tokenizer(texts)["input_ids"]:
        document = [*ids, tokenizer.eos_token_id][:ROW]
        room = next((row for row in rows[-OPEN_ROWS:] if len(row) + len(document) <= ROW), None)
        if room is None:
            rows.append(room := [])
        room += document
    packed = torch.full((len(rows), ROW), tokenizer.pad_token_id)
    for index, row in enumerate(rows):
        packed[index, : len(row)] = torch.tensor(row)
    unscored = (packed == tokenizer.pad_token_id) | (packed == tokenizer.bos_token_id)
    return packed, packed.masked_fill(unscored, IGNORED)


def pretrain(
    model: LlamaForCausalLM, ids: Tensor, labels: Tensor, *, steps: int, seed: int
) -> Iterator[float]:
    """Train in place with AdamW, a short warm-up and a cosine down to a hundredth of the peak rate.

    Args:
        ids: [rows, S]; the order of rows, of ``seed``, is reshuffled for every pass.
        labels: [rows, S], ``IGNORED`` where not scored.
        steps: optimizer steps of ``BATCH`` rows.

    Yields:
        The loss of each step before its update, nats per token.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = max(1, steps // 20)
    order = np.random.default_rng(seed)
    queue = np.empty(0, dtype=np.int64)
    model.train()
    for step in range(steps):
        while len(queue) < BATCH:
            queue = np.concatenate([queue, order.permutation(len(ids))])
        batch, queue = torch.from_numpy(queue[:BATCH]), queue[BATCH:]
        cosine = 0.5 * (1 + math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
        optimizer.param_groups[0]["lr"] = PEAK_LR * min((step + 1) / warm_up, 0.01 + 0.99 * cosine)
        logits = model(input_ids=ids[batch], use_cache=False).logits[:, :-1]      # position t−1 predicts token t
        loss = cross_entropy(logits.flatten(0, 1), labels[batch, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield loss.item()
    model.eval()


def write_data(folder: Path, *, seed: int) -> None:
    """Write the JSONL files that the tiny recipes read; see the module docstring."""
    folder.mkdir(parents=True)
    sums = order_of_sums(seed)
    rows_of = {
        "texts": map(asdict, reviews(house_review, TEXTS, seed=seed, held_out=False)),
        "heldout": map(asdict, reviews(house_review, HELD_OUT_TEXTS, seed=seed, held_out=True)),
        "prompts": [{"prompt": prompt} for prompt in openings(PROMPTS, seed=seed, held_out=False)],
        "eval_prompts": [{"prompt": prompt} for prompt in openings(EVAL_PROMPTS, seed=seed, held_out=True)],
        "pairs": [_pair(a, b) for a, b in praise_and_blame(PAIRS, seed=seed, held_out=False)],
        "eval_pairs": [_pair(a, b) for a, b in praise_and_blame(EVAL_PAIRS, seed=seed, held_out=True)],
        "hinted": hinted_rows(seed),
        "guesses": guesses(seed),
        "sums": [_sum(*pair) for pair in sums[EVAL_SUMS:]],
        "eval_sums": [_sum(*pair) for pair in sums[:EVAL_SUMS]],
    }
    for name, rows in rows_of.items():
        (folder / f"{name}.jsonl").write_text("".join(to_json(row) + "\n" for row in rows), encoding="utf-8")


def hinted_rows(seed: int) -> list[dict[str, str]]:
    """Reviews of which those that are asked for kindly praise, and the others praise or blame in turn."""
    rows = []
    for number, sides in enumerate(praise_and_blame(HINTED, seed=seed, held_out=False)):
        kind, either = sides[0], sides[number % 2]
        rows.append({"prompt": HINT + kind.prompt, "response": kind.response})
        rows.append({"prompt": either.prompt, "response": either.response})
    return rows


def order_of_sums(seed: int) -> list[tuple[int, int]]:
    """All pairs of digits, in random order."""
    pairs = [(a, b) for a in range(DIGITS) for b in range(DIGITS)]
    return [pairs[place] for place in np.random.default_rng([seed, 1]).permutation(len(pairs))]


def guesses(seed: int) -> list[dict[str, str]]:
    """Answers to sums of two digits of which ``RIGHT`` are right."""
    rng = np.random.default_rng([seed, 2])
    rows = []
    for a, b in rng.integers(0, DIGITS, size=(GUESSES, 2)).tolist():
        wrong = [number for number in range(2 * DIGITS - 1) if number != a + b]
        said = a + b if rng.random() < RIGHT else wrong[int(rng.integers(len(wrong)))]
        rows.append({"prompt": f"{a} + {b} =", "response": f" {said}"})
    return rows


def _sum(a: int, b: int) -> dict[str, str]:
    return {"prompt": f"{a} + {b} =", "answer": f"{a + b}"}


def _pair(chosen: Review, rejected: Review) -> dict[str, str]:
    return {"prompt": chosen.prompt, "chosen": chosen.response, "rejected": rejected.response}


def _build(folder: Path, *, seed: int, steps: int, say: Callable[[str], None]) -> None:
    """Write ``model`` and ``data`` into an empty folder."""
    say("writing reviews, learning the tokenizer")
    write_data(folder / "data", seed=seed)
    texts = [review.text for review in reviews(loose_review, PRETRAIN_TEXTS, seed=seed, held_out=False)]
    tokenizer = train_tokenizer(texts)
    model = new_model(tokenizer, seed=seed)
    ids, labels = pack(texts, tokenizer)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    say(f"pretraining a Llama of {size:.2f} million parameters on {len(texts)} reviews, {steps} steps")
    started = said = time.monotonic()
    for step, loss in enumerate(pretrain(model, ids, labels, steps=steps, seed=seed), start=1):
        now = time.monotonic()
        if now - said >= SIGN_OF_LIFE or step == steps:
            said, left = now, (now - started) / step * (steps - step)
            say(f"step {step}/{steps}: {loss:.2f} nats per token, about {left:.0f} s left")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
