"""Documents as text for a screen: what ``eval-kl`` and ``sample`` give, every number with its error and unit."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

from kltune.recipe.faults import visible
from kltune.run.screen import interval, number, percent, with_error

MARKED = 0.3            # nats at a token from which it is marked
TERMINAL_SHADES = ((1.0, "1;31"), (MARKED, "31"), (0.05, "33"))      # least nats, and the colour from there on
SEEN_ROUNDING = 1e-6    # nats per token from which the noise floor is worth a line; float32 stays far below
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH = 60              # positions drawn side by side
PROMPT_ROWS = 5
ESTIMATOR_NAMES = {"cv": "exact, k1 as control variate", "exact": "exact", "k1": "k1", "k3": "k3"}
Table = list[list[str]]  # headings first


def aligned(table: Table) -> Iterator[str]:
    """A table as lines, its columns under their headings."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        cells = (f"{visible(cell):<{width}}" for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def eval_kl_text(document: dict[str, Any], *, colour: bool = False) -> str:
    """The document of ``eval-kl`` as text; ``colour`` as for `_response_line`."""
    if "checkpoints" in document:
        texts = [eval_kl_text(one, colour=colour) for one in document["checkpoints"]]
        return "\n\n".join([*texts, "\n".join(_differences(document["differences"]))])
    lines = [] if document["gate"] is None else [verdict_line(document["gate"])]
    if "server" in document:
        return "\n".join([*lines, *_served(document)])
    lines += [*_estimates(document), *_checks_and_spread(document), *_where_the_kl_is(document, colour)]
    return "\n".join([*lines, *(f"  warning: {visible(warning)}" for warning in document.get("warnings", ()))])


def _estimates(document: dict[str, Any]) -> Iterator[str]:
    dtype = f" · {document['dtype']}" if "dtype" in document else ""
    reference = document.get("reference") or {}
    told = not document.get("own_reference", True) or reference.get("quantization")
    other = f" · reference {visible(reference['path'])}{_rounded(reference)}" if told else ""
    yield (
        f"{document['direction']} · {visible(document['checkpoint'])}{_rounded(document)}{other} · "
        f"{document['responses']} responses to "
        f"{document['prompts']} prompts · temperature {document['temperature']:g} · "
        f"at most {document['max_new_tokens']} tokens{dtype}"
    )
    rows = [(ESTIMATOR_NAMES[name], kl) for name, kl in document["kl"].items()]
    if document["forward"]:
        rows.append(("forward: KL(reference||policy)", document["forward"]["exact"]))
    if document["deployed"]:
        cut = ", ".join(f"{n} {document[n]:g}" for n in ("top_p", "top_k") if document[n] is not None)
        rows.append((f"deployed ({cut}) vs base", document["deployed"]["vs_base"]))
        rows.append(("deployed, both cut alike", document["deployed"]["both"]))
    width = max(30, 2 + max(len(name) for name, _ in rows))
    yield f"  {'estimator':<{width}}{'nats per response':<26}nats per token"
    for name, kl in rows:
        per_response, per_token = (
            with_error(kl[f"nats_per_{unit}"], kl[error])
            for unit, error in (("response", "stderr"), ("token", "token_stderr"))
        )
        yield f"  {name:<{width}}{per_response:<26}{per_token}"


def _served(document: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{document['direction']} · {visible(pair_name(document))} · {document['responses']} responses to "
        f"{document['prompts']} prompts · temperature 1 · at most {document['max_new_tokens']} tokens"
    )
    server, topk, k1 = document["server"], document["kl"]["topk"], document["kl"]["k1"]
    ends = "" if topk["ci"] is None else f", {_ends(document, topk)} at {percent(document['confidence'])}%"
    kl, sampled = (with_error(one["nats_per_response"], one["stderr"]) for one in (topk, k1))
    yield (
        f"  {kl} nats per response{ends}: the {server['top_logprobs']} likeliest tokens summed "
        f"({percent(server['mass'], 1)}% of the probability), the others sampled"
    )
    yield f"  k1 {sampled}; agrees to {document['agreement_z']:+.1f} standard errors"
    yield f"  the responses are a sample of their log-probs to {document['surprise_z']:+.1f} standard errors"
    for warning in document["warnings"]:
        yield f"  warning: {visible(warning)}"


def headline(document: dict[str, Any]) -> dict[str, Any]:
    """The figures that a verdict is about: exact, or of a served model those from top-k log-probs."""
    return document["kl"].get("exact") or document["kl"]["topk"]


def budget_of(gate: dict[str, Any] | None) -> tuple[float, ...]:
    """What a KL in nats per response is held against, if it is."""
    return (gate["max_kl"],) if gate is not None and gate["unit"] == "nats_per_response" else ()


def _ends(document: dict[str, Any], kl: dict[str, Any]) -> str:
    return interval(kl["ci"], against=budget_of(document["gate"]))


def _checks_and_spread(document: dict[str, Any]) -> Iterator[str]:
    exact, spread = document["kl"]["exact"], document["distribution"]
    if exact["ci"] is not None:
        yield f"  {percent(document['confidence'])}% interval of exact: {_ends(document, exact)} nats per response"
    else:
        yield "  one prompt: no standard errors and no interval"
    yield (
        f"  k1 agrees with exact to {round(document['agreement_z'], 1) + 0.0:+.1f} standard errors; "      # no -0.0
        f"{percent(document['truncated_fraction'], 0)}% of the responses reached the length limit"
    )
    if (sampler := document.get("sampler")) is not None:
        apart = sampler["kl_nats_per_token"]
        yield f"  responses drawn by {visible(sampler['url'])}, {apart:.2g} nats per token from the policy's own"
    floor = document["noise_floor"]
    if floor["nats_per_token"] >= SEEN_ROUNDING:
        yield (
            f"  rounding alone ({document['reference']['dtype']}) makes {floor['nats_per_response']:.2g} nats per "
            f"response, {floor['nats_per_token']:.2g} per token: the policy against itself in other batches"
        )
    quantiles = spread["quantiles"]
    yield (
        f"  responses: median {quantiles['0.5']:.3f}, 90 % below {quantiles['0.9']:.3f}, 99 % below "
        f"{quantiles['0.99']:.3f}, largest {spread['maximum']:.3f} nats with "
        f"{percent(spread['largest_share'], 1)}% of all KL"
    )
    if spread["heavy"]:
        yield "  warning: one response carries more than 10 % of the KL; its standard error is not to be trusted"
    entropy = document["entropy"]
    line = f"  entropy {entropy['policy']:.3f} nats per token, reference {entropy['reference']:.3f}"
    line += f" · TV {with_error(document['tv'], document['tv_stderr'])} of at most 1"
    if document["js"] is not None:
        line += f" · JS {with_error(document['js'], document['js_stderr'])} of at most {math.log(2.0):.3f}"
    yield line
    if document["alignment_tax"] is not None:
        tax = document["alignment_tax"]
        yield (
            f"  alignment tax {with_error(tax['nats_per_token'], tax['stderr'])} nats per token "
            f"on {tax['documents']} held-out texts"
        )
    if exact["nats_per_response"] == 0.0:
        why = ": nothing in it was trained, or nothing of it was loaded" if document.get("own_reference", True) else ""
        yield f"  this checkpoint equals its reference{why}"
    for row in document.get("against", ()):
        kl = row["kl"]["exact"]
        ends = "" if kl["ci"] is None else f", {_ends(row, kl)}"
        gate = "" if row["gate"] is None else f"; {verdict_line(row['gate'])}"
        measured = with_error(kl["nats_per_response"], kl["stderr"])
        yield f"  against {visible(row['reference']['path'])}: {measured} nats per response{ends}{gate}"


def _where_the_kl_is(document: dict[str, Any], colour: bool) -> Iterator[str]:
    """By position, token and prompt, and a few responses; nothing where there is no KL."""
    if document["kl"]["exact"]["nats_per_response"] == 0.0:
        return
    rows = document["by_position"]
    if len(rows) > 1:
        bars, top = _bars(rows)
        yield f"  by position, 1 to {rows[-1]['position']}: {bars} (full height {top:.3f} nats)"
    if document["top_tokens"]:
        yield f"  {'token':<16}{'share of KL':<14}{'policy says':<14}{'reference would':<17}times per response"
        end = {"token": "(end of text)", **document["end_token"]}
        for row in (*document["top_tokens"], end):
            name = visible(row["token"]) if row is end else repr(row["token"])
            yield (
                f"  {name:<16}{percent(row['share'], 1) + '%':<14}{row['policy_per_response']:<14.3f}"
                f"{row['reference_per_response']:.3f}"
            )
    if document["top_prompts"]:
        yield "  prompts of the most KL, nats per response"
        for row in document["top_prompts"][:PROMPT_ROWS]:
            yield f"  {row['nats_per_response']:>8.3f}  {_short(row['prompt'])!r}"
    if document["examples"]:
        yield f"  responses{'' if colour else f', tokens of {MARKED:g} nats or more marked'}"
        for row in document["examples"]:
            cut = " (cut)" if row["truncated"] else ""
            tokens = ((token["token"], token["nats"]) for token in row["tokens"])
            yield f"  {row['nats']:>8.3f}  {_short(row['prompt'])!r} → {_response_line(tokens, colour)}{cut}"


def _differences(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "differences in exact KL, nats per response, on the same prompts and random numbers"
    for row in rows:
        ends = "" if row["ci"] is None else f", {interval(row['ci'])}"
        difference = with_error(row["nats_per_response"], row["stderr"])
        yield f"  {difference}{ends}  {visible(row['checkpoint'])} minus {visible(row['minus'])}"


def eval_kl_lines(document: dict[str, Any]) -> str:
    """The document of ``eval-kl`` in a line for each checkpoint: the gate's verdict, if there is one, and the KL."""
    return "\n".join(verdict_and_kl(one) for one in measured_pairs(document))


def measured_pairs(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Each checkpoint of a document with each of its references, as the document of that pair alone."""
    checkpoints = document.get("checkpoints", [document])
    return [
        one | {"own_reference": False} | part if number else one
        for one in checkpoints for number, part in enumerate((one, *one.get("against", ())))
    ]


def verdict_and_kl(document: dict[str, Any]) -> str:
    """One checkpoint's verdict, if there is one, its KL and its warnings in a line."""
    exact = headline(document)
    kl = f"KL {with_error(exact['nats_per_response'], exact['stderr'])} nats per response"
    verdict = [] if document["gate"] is None else [verdict_line(document["gate"])]
    warnings = [f"warning: {warning}" for warning in document.get("warnings", ())]
    return f"{visible(pair_name(document))}: {'; '.join([*verdict, kl, *warnings])}"


def pair_name(document: dict[str, Any]) -> str:
    """A checkpoint, and what it is held against where that is not its own reference."""
    reference = document.get("reference") or {}
    names = [document["checkpoint"] + _rounded(document)]
    if not document.get("own_reference", True) or reference.get("quantization"):
        names.append(reference["path"] + _rounded(reference))
    return " against ".join(names)


def _rounded(facts: dict[str, Any]) -> str:
    return f" ({facts['quantization']})" if facts.get("quantization") else ""


def verdict_line(gate: dict[str, Any]) -> str:
    """What the gate says, in words."""
    budget = f"{gate['max_kl']:g} {gate['unit'].replace('_', ' ')}"
    look = gate["looks"][-1]
    sure = f"at {percent(gate['confidence'])}% confidence"
    if gate["planned_looks"] > 1:
        sure += (
            f" (look {len(gate['looks'])} of at most {gate['planned_looks']}, {look['responses']} responses; each "
            f"interval at {percent(look['confidence'], digits=3)} %)"
        )
    reason = gate.get("reason")
    note = "" if reason is None else f"; {reason}"
    if gate["verdict"] == "pass":
        return f"PASS: within {budget} {sure}{note}"
    if gate["verdict"] == "fail":
        return f"FAIL: over {budget} {sure}{note}"
    why = f"INCONCLUSIVE against {budget}: {reason or 'the interval straddles the budget'}"
    if gate["wants_prompts"]:
        return f"{why}; only more prompts would decide it, not more responses"
    more = gate["more_responses"]
    return why if more is None else f"{why}; about {more} more responses would decide it (--responses, or --auto)"


def _bars(rows: list[dict[str, Any]]) -> tuple[str, float]:
    """Mean KL by position as a row of blocks, several positions to a block where there are many."""
    step = math.ceil(len(rows) / WIDTH)
    groups = [rows[start : start + step] for start in range(0, len(rows), step)]
    means = [
        sum(row["nats"] * row["responses"] for row in group) / sum(row["responses"] for row in group)
        for group in groups
    ]
    top = max(means)
    heights = [min(len(BLOCKS) - 1, int(len(BLOCKS) * mean / top)) if top > 0.0 else 0 for mean in means]
    return "".join(BLOCKS[height] for height in heights), top


def _response_line(tokens: Iterable[tuple[str, float]], colour: bool) -> str:
    """A response in one line: its tokens coloured by their KL, or those of ``MARKED`` and more followed by theirs."""
    return "".join(_token(token, nats, colour) for token, nats in tokens)


def _token(text: str, nats: float, colour: bool) -> str:
    text = visible(text.replace("\n", "⏎"))
    if not colour:
        return f"{text}[{nats:.1f}]" if nats >= MARKED else text
    shade = next((code for least, code in TERMINAL_SHADES if nats >= least), None)
    return text if shade is None else f"\033[{shade}m{text}\033[0m"


def _short(text: str) -> str:
    return visible(text if len(text) <= 48 else f"…{text[-47:]}")


def sample_text(document: dict[str, Any], *, colour: bool = False) -> str:
    """The document of ``sample`` as text; ``colour`` as for `_response_line`."""
    answers = [answers_text(entry, colour=colour) for entry in document["prompts"]]
    return "\n\n".join([sample_heading(document, colour=colour), *answers])


def sample_heading(document: dict[str, Any], *, colour: bool = False) -> str:
    """What was asked how, and how to read it."""
    marked = "coloured by it" if colour else f"of {MARKED:g} or more marked"
    return (
        f"{visible(pair_name(document))} · temperature {document['temperature']:g} · at most "
        f"{document['max_new_tokens']} tokens · seed {document['seed']} · the same random numbers for both\n"
        f"KL in nats: of the policy to the reference on its words, and the other way round; tokens {marked}"
    )


def compare_text(document: dict[str, Any]) -> str:
    """Who wins how often, and how sure that is."""
    first, second = (visible(document[side]["checkpoint"]) for side in ("first", "second"))
    low, high = document["ci"]
    verdict = f"{first} is preferred" if low > 0.5 else f"{second} is preferred" if high < 0.5 else "undecided"
    lengths = " · ".join(number(document[side]["tokens"], 1) for side in ("first", "second"))
    return "\n".join([
        f"win rate of {first} over {second}: {percent(document['win_rate'], 1)} % "
        f"({percent(document['confidence'])}%: {interval((100 * low, 100 * high), 1, (0, 50, 100))}), a tie counting "
        f"half: {verdict}",
        f"{document['wins']} wins, {document['ties']} ties, {document['losses']} losses over {document['prompts']} "
        f"prompts, by {visible(document['judge'])}",
        f"tokens per response: {lengths}",
    ])


def answers_text(entry: dict[str, Any], *, colour: bool = False) -> str:
    """One prompt with what policy and reference answer."""
    lines = [f"{'prompt':<18}{visible(entry['prompt'].replace(chr(10), '⏎'))}"]
    for pair in entry["responses"]:
        for name, side in pair.items():
            tokens = zip(side["tokens"], side["token_kl"], strict=True)
            cut = " (cut)" if side["truncated"] else ""
            lines.append(f"{name:<11}{side['kl']:>6.2f} {_response_line(tokens, colour)}{cut}")
    return "\n".join(lines)
