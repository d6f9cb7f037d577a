"""The document of ``kltune eval-kl`` for people: every number with its standard error, direction and unit."""

import math
from typing import Any


def render(document: dict[str, Any]) -> str:
    """The document as lines of text.

    Args:
        document: what ``eval_kl`` returns.
    """
    if "checkpoints" in document:
        return "\n\n".join(render(part) for part in document["checkpoints"])
    lines = [
        f"{document['direction']} · {document['checkpoint']} · {document['responses']} responses to "
        f"{document['prompts']} prompts · temperature {document['temperature']:g} · "
        f"at most {document['max_new_tokens']} tokens",
        f"  {'estimator':<11}{'nats per response':<26}{'nats per token':<20}",
    ]
    rows = [*document["kl"].items()]
    if document["forward"]:
        rows.append(("forward", document["forward"]["exact"]))
    for name, kl in rows:
        lines.append(
            f"  {name:<11}{with_error(kl['nats_per_response'], kl['stderr']):<26}"
            f"{with_error(kl['nats_per_token'], kl['token_stderr']):<20}"
        )
    exact, confidence = document["kl"]["exact"], document["confidence"]
    if exact["ci"] is not None:
        lines.append(
            f"  {confidence:.0%} interval of exact: {exact['ci'][0]:.3f} to {exact['ci'][1]:.3f} nats per response"
        )
    lines.append(
        f"  k1 agrees with exact to {document['agreement_z']:+.1f} standard errors; "
        f"{document['truncated_fraction']:.0%} of the responses reached the length limit"
    )
    entropy = document["entropy"]
    lines.append(f"  entropy {entropy['policy']:.3f} nats per token, reference {entropy['reference']:.3f}")
    if document["js"] is not None:
        lines.append(f"  JS divergence {document['js']:.3f} (at most {math.log(2.0):.3f})")
    if document["alignment_tax"] is not None:
        tax = document["alignment_tax"]
        lines.append(
            f"  alignment tax {with_error(tax['nats_per_token'], tax['stderr'])} nats per token "
            f"on {tax['documents']} held-out texts"
        )
    if exact["nats_per_response"] == 0.0:
        lines.append("  this checkpoint equals its reference: nothing in it was trained, or nothing of it was loaded")
    gate = document["gate"]
    if gate is not None:
        lines.append(verdict_line(gate))
    return "\n".join(lines)


def verdict_line(gate: dict[str, Any]) -> str:
    """What the gate says, in words."""
    budget = f"{gate['max_kl']:g} {gate['unit'].replace('_', ' ')}"
    if gate["verdict"] == "pass":
        return f"  PASS: within {budget} at {gate['confidence']:.0%} confidence"
    if gate["verdict"] == "fail":
        return f"  FAIL: over {budget} at {gate['confidence']:.0%} confidence"
    more = gate["more_responses"]
    advice = "" if more is None else f"; about {more} more responses would decide it (--responses)"
    return f"  INCONCLUSIVE: the interval straddles {budget}{advice}"


def with_error(value: float, error: float | None) -> str:
    """A number and its standard error."""
    return f"{value:.3f} ± {error:.3f}" if error is not None else f"{value:.3f} (one prompt: no error)"
