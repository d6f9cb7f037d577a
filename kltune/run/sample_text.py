"""The document of ``kltune sample`` for people: policy above reference, each token with its KL."""

from collections.abc import Iterator
from typing import Any

from kltune.run.kl_text import LOUD, shaded
from kltune.run.storage import visible


def render_sample(document: dict[str, Any], *, colour: bool = False) -> str:
    """The whole document as lines of text.

    Args:
        document: what ``sample`` returns.
        colour: colour tokens by their KL with ANSI codes; else those of ``LOUD`` nats or more are followed by it.
    """
    blocks = [render_prompt(entry, colour=colour) for entry in document["prompts"]]
    return "\n\n".join(["\n".join(heading(document, colour=colour)), *blocks])


def heading(document: dict[str, Any], *, colour: bool = False) -> Iterator[str]:
    """What was asked how, and how to read it."""
    yield (
        f"{visible(document['checkpoint'])} · temperature {document['temperature']:g} · at most "
        f"{document['max_new_tokens']} tokens · seed {document['seed']} · the same random numbers for both"
    )
    marked = "coloured by it" if colour else f"of {LOUD:g} or more marked"
    yield f"KL in nats: of the policy to the reference on its words, and the other way round; tokens {marked}"


def render_prompt(entry: dict[str, Any], *, colour: bool = False) -> str:
    """One prompt with what both say to it."""
    lines = [f"{'prompt':<18}{visible(entry['prompt'].replace(chr(10), '⏎'))}"]
    for pair in entry["responses"]:
        for name, side in pair.items():
            tokens = [{"token": t, "nats": n} for t, n in zip(side["tokens"], side["token_kl"], strict=True)]
            cut = " (cut)" if side["truncated"] else ""
            lines.append(f"{name:<11}{side['kl']:>6.2f} {shaded(tokens, colour)}{cut}")
    return "\n".join(lines)
