"""What a reward model learns from: pairs, or responses judged one by one; as sequences, and which are held out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kltune.errors import DataError
from kltune.lm.data import Counts
from kltune.lm.encoding import Encoder, Ids
from kltune.lm.forms import LABELLED_FORM, PAIR_FORMS
from kltune.lm.pairs import Answer, Labelled, Pair, load_labelled, load_pairs
from kltune.lm.reward_reader import spelled
from kltune.lm.rows import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Comparison = Pair | Labelled
READ_AGAIN = 256        # rows on which it is tried whether their text gives their tokens again


def load_comparisons(
    source: str, tokenizer: "PreTrainedTokenizerBase", **rules: Any
) -> tuple[list[Pair] | list[Labelled], Counts]:
    """Read pairs with their margins, or labelled responses, whichever the first row of the source is.

    Arguments, returns and errors as `load_pairs` and `load_labelled`.
    """
    first = next((row.fields for row in read_rows(source) if not row.fault), {})
    present = {name for name, value in first.items() if value is not None}
    labelled = present.issuperset(LABELLED_FORM) and not any(present.issuperset(form) for form in PAIR_FORMS)
    if labelled:
        return load_labelled(source, tokenizer, **rules)
    return load_pairs(source, tokenizer, margins=True, **rules)


def answers(row: Comparison) -> tuple[Answer, ...]:
    """The responses of a row: of a pair the chosen one first."""
    return (row.chosen, row.rejected) if isinstance(row, Pair) else (row.response,)


def sequences(rows: Sequence[Comparison]) -> list[Ids]:
    """Prompt and response of every row; of pairs all that were chosen, then all that were rejected."""
    return [row.prompt.ids + answer.ids for side in zip(*map(answers, rows), strict=True)
            for row, answer in zip(rows, side, strict=True)]


def hold_out(
    rows: Sequence[Comparison], share: float, seed: int, source: str
) -> tuple[list[Comparison], list[Comparison]]:
    """Split rows by their prompts, so that no prompt is on both sides.

    Args:
        rows: all there are.
        share: of the prompts, rounded, but at least one; 0 holds out nothing.
        seed: which ones.
        source: names the rows in the error.

    Returns:
        (to train on, held out), each in the order of ``rows``.

    Raises:
        DataError: there is one prompt only.
    """
    if share == 0.0:
        return list(rows), []
    prompts = list(dict.fromkeys(row.prompt.ids for row in rows))
    if len(prompts) < 2:
        raise DataError(
            f"{source}: all {len(rows)} rows answer one prompt, and rows are held out by prompt; give held-out rows as "
            "eval.pairs, or write eval.pairs_share: 0 to measure nothing."
        )
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    order = np.random.default_rng([seed, len(prompts)]).permutation(len(prompts))
    chosen = {prompts[at] for at in order[:count]}
    return [r for r in rows if r.prompt.ids not in chosen], [r for r in rows if r.prompt.ids in chosen]


def reads_text(rows: Sequence[Comparison], tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether prompt and response as text give their tokens again; those that a chat template wrote do not.

    One row that does will tell: rows that were truncated do not either.
    """
    encoder, end = Encoder(tokenizer, "none"), tokenizer.eos_token_id
    return any(
        spelled(encoder, row.prompt.text, answer.text, answer.ids[-1] == end, None) == row.prompt.ids + answer.ids
        for row in rows[:READ_AGAIN] for answer in answers(row)
    )
