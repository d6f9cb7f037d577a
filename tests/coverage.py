"""How often intervals of a KL hold it, and how often the gate passes a policy that is just over its budget.

    python -m tests.coverage --times 300
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from kltune.core.kl.gate import verdict
from kltune.core.kl.intervals import summarize

Sample = tuple[np.ndarray, np.ndarray]      # nats and tokens of each response, [prompts, responses of a prompt]
JUST_OVER = 1.0 - 1e-9                      # budget over KL


@dataclass(frozen=True)
class Case:
    """draw: a sample of so many responses. truth: its KL, nats per response. ordinary: no tail to speak of."""

    name: str
    prompts: int
    per_prompt: int
    truth: float
    draw: Callable[[np.random.Generator, tuple[int, int]], Sample]
    ordinary: bool = False


@dataclass(frozen=True)
class Found:
    """Shares of the samples. held: the interval holds the truth. over: it ends below it. passed: the gate passes a
    budget just below the truth. width: the interval's median width, in standard errors of the mean."""

    held: float
    over: float
    passed: float
    width: float


def alike(nats: Callable[[np.random.Generator, tuple[int, int]], np.ndarray]) -> Callable[..., Sample]:
    """Responses of one length."""
    return lambda rng, size: (nats(rng, size), np.full(size, 20.0))


def spikes(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """About 1 nat, and 51 in 2 % of the responses."""
    return rng.gamma(2.0, 0.5, size) + 50.0 * (rng.random(size) < 0.02)


def unequal(rng: np.random.Generator, size: tuple[int, int]) -> Sample:
    """1 to 64 tokens, about 20; a tenth of a nat a token."""
    tokens = np.minimum(rng.geometric(0.05, size), 64).astype(float)
    return tokens * rng.gamma(2.0, 0.05, size), tokens


def of_prompts(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Prompts that differ by half of their mean, and responses that differ within them."""
    return 3.0 * rng.gamma(4.0, 0.25, (size[0], 1)) * rng.gamma(1.5, 1 / 1.5, size)


def cases() -> list[Case]:
    """What an interval is tried on."""
    lognormal = alike(lambda rng, size: rng.lognormal(0.0, 1.5, size))
    gamma = alike(lambda rng, size: rng.gamma(1.5, 1.0, size))
    normal = alike(lambda rng, size: rng.normal(3.0, 1.0, size))
    tokens, several = (1.0 - 0.95**64) / 0.05, ((8, 32), (16, 16), (32, 8), (64, 8))
    return [
        *(Case("lognormal(1.5)", m, 1, math.exp(1.125), lognormal) for m in (16, 64, 200)),
        *(Case("2 % spikes", m, 1, 2.0, alike(spikes)) for m in (16, 64, 200)),
        *(Case("gamma(1.5)", m, 1, 1.5, gamma, m >= 64) for m in (4, 16, 64, 256)),
        *(Case("normal", m, 1, 3.0, normal, m >= 64) for m in (16, 64, 256)),
        *(Case("unequal lengths", m, 1, 0.1 * tokens, unequal) for m in (16, 64)),
        *(Case("prompts differ", m, n, 3.0, alike(of_prompts), m >= 64) for m, n in several),
    ]


def try_out(case: Case, times: int, seed: int = 0) -> Found:
    """So many samples of a case."""
    rng, size = np.random.default_rng(seed), (case.prompts, case.per_prompt)
    prompts = torch.arange(case.prompts).repeat_interleave(case.per_prompt)
    held, over, passed, widths = [], [], [], []
    for _ in range(times):
        nats, tokens = case.draw(rng, size)
        kl = summarize("exact", torch.tensor(nats.ravel()), torch.tensor(tokens.ravel()), prompts)
        held.append(kl.ci[0] <= case.truth <= kl.ci[1])
        over.append(kl.ci[1] < case.truth)
        passed.append(verdict(kl, JUST_OVER * case.truth).verdict == "pass")
        widths.append((kl.ci[1] - kl.ci[0]) / kl.stderr)
    return Found(*(float(np.mean(column)) for column in (held, over, passed)), float(np.median(widths)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=300)
    times = parser.parse_args().times
    print("| distribution | prompts × responses | holds | ends below | gate passes | width, stderr |")
    print("|---|---|---|---|---|---|")
    for case in cases():
        found = try_out(case, times)
        print(
            f"| {case.name} | {case.prompts} × {case.per_prompt} | {found.held:.3f} | {found.over:.3f} | "
            f"{found.passed:.3f} | {found.width:.2f} |", flush=True,
        )


if __name__ == "__main__":
    main()
