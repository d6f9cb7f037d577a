"""Which pictures a run has, by what was measured: each with its curves, its limits and where the reference stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

from kltune.recipe.faults import visible
from kltune.report.plots import (
    CAP,
    COLOURS,
    INK,
    TARGET,
    Z95,
    Series,
    draw_level,
    draw_series,
    finish_axes,
    make_axes,
    names_as_they_are,
    set_log,
    shown_in_legend,
)
from kltune.run.screen import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
TOLERANCE = 0.15       # how far from its target a KL still counts as on it
TRAINING = ("kl/ref_nats_per_response", "kl/ref_nats_per_token", "score/mean", "policy/entropy_nats_per_token",
            "response/tokens", "loss/mean", "accuracy/mean", "pairs/margin_nats")      # of one noisy batch each
HELD_OUT = ("eval/kl_ref_nats_per_response", "eval/kl_ref_nats_per_token", "eval/score_mean", "eval/gold_mean",
            "eval/win_rate", "eval/entropy_nats_per_token", "eval/response_tokens", "eval/end_fraction", "eval/loss",
            "eval/accuracy", "eval/margin_nats")
CURVE_NAMES = dict.fromkeys(TRAINING, "training") | dict.fromkeys(HELD_OUT, "held out") | {
    "eval/score_z": "proxy (trained on)", "eval/gold_z": "gold",
    "eval/distinct_1": "distinct-1", "eval/distinct_2": "distinct-2",
    "eval/distinct_2_adjusted": "distinct-2, adjusted",
    "eval/distinct_2_per_input": "per input", "eval/distinct_2_across_input": "across inputs",
    "eval/self_bleu": "self-BLEU", "eval/duplicate_fraction": "duplicates",
    "eval/tax_nats_per_token": "policy", "eval/perplexity": "policy",
    "trpo/predicted_gain": "predicted", "trpo/gain": "measured", "kl/step_nats_per_response": "measured",
    "kl/step_limit_nats_per_response": "allowed in this step", "trpo/radius_nats_per_response": "allowed in this step",
    "trpo/line_search_tries": "tries",
    "trpo/accepted": "accepted", "trpo/last_gain_on_new_responses": "on the next responses",
    "kl/cap_rollbacks": "gone back", "kl/cap_refusals": "steps cut short",
    "pairs/chosen_log_ratio_nats": "chosen", "pairs/rejected_log_ratio_nats": "rejected",
}
STANDARD_ERRORS = {
    "kl/ref_nats_per_response": "kl/ref_stderr", "eval/kl_ref_nats_per_response": "eval/kl_ref_stderr",
    "eval/score_mean": "eval/score_stderr", "eval/gold_mean": "eval/gold_stderr",
    "eval/score_z": "eval/score_z_stderr", "eval/gold_z": "eval/gold_z_stderr",
    "eval/margin_nats": "eval/margin_stderr", "eval/tax_nats_per_token": "eval/tax_stderr",
}
ENOUGH = 5             # points that make a curve to compare by


@dataclass(frozen=True)
class KLLimits:
    """Target and caps of a recipe, in ``unit``; None where it sets none."""

    unit: str = "nats_per_response"
    target: float | None = None
    hard_cap: float | None = None
    max_step_kl: float | None = None


@dataclass(frozen=True)
class Plot:
    """One picture: its title, the unit of its y axis, and patterns for the names of its curves.

    log: a log axis, where the values are far apart. limited: which limits belong in it: "ref" for target and hard cap,
    "step" for the largest step. zero: the reference stands at 0 by definition.
    """

    title: str
    unit: str
    patterns: tuple[str, ...]
    log: bool = False
    limited: str = ""
    zero: bool = False


@dataclass(frozen=True)
class Recorded:
    """What a run has measured: its rows as of ``read_metrics``, and the evaluation of what it saved ({} before that).

    final_step: steps that what was saved had done; None is all of them.
    """

    rows: Sequence[dict[str, Any]]
    final: dict[str, Any]
    final_step: int | None = None

    @cached_property
    def last_step(self) -> float:
        """The newest step of all."""
        return max((row["step"] for row in self.rows if is_number(row.get("step"))), default=0)

    @cached_property
    def names(self) -> list[str]:
        """Everything that was measured, in alphabetical order."""
        found: set[str] = set()
        for row in (*self.rows, self.final):
            found |= {name for name in row.keys() - found if is_number(row[name])}
        return sorted(found)

    def series(self, name: str) -> Series:
        """What the rows hold of one metric; [] if nothing was measured."""
        error = STANDARD_ERRORS.get(name, "")
        return [(row["step"], row[name], row.get(error)) for row in self.rows if row.get(name) is not None]

    def reference(self, name: str) -> float | None:
        """What the reference's own responses gave where ``name`` is the policy's; None where that was not measured."""
        key = name.replace("eval/", "eval/reference_", 1) if name.startswith("eval/") else ""
        rows = chain([self.final], reversed(self.rows))
        return next((row[key] for row in rows if is_number(row.get(key))), None)


def plots_for(limits: KLLimits) -> dict[str, tuple[Plot, ...]]:
    """The plots of a report under their headings, most asked for first; `draw` leaves out what was not measured."""
    names = (f"kl/ref_{limits.unit}", f"eval/kl_ref_{limits.unit}")
    return {
        "KL and score": (
            Plot("KL to the reference", limits.unit.replace("_per_", " per "), names, limited="ref"),
            Plot("Score", "score", ("score/mean", "eval/score_mean")),
            Plot("Gold score", "score, never trained on", ("eval/gold_mean",)),
            Plot("Win rate over the reference", "share, a tie ½", ("eval/win_rate",)),
            Plot("Proxy and gold", "sd of the reference", ("eval/score_z", "eval/gold_z"), zero=True),
            Plot("Price of one nat (beta)", "score per nat", ("kl/beta",), log=True),
            Plot("Cap", "times so far", ("kl/cap_rollbacks", "kl/cap_refusals")),
        ),
        "Loss and accuracy": (
            Plot("Loss", "loss", ("loss/mean", "eval/loss*"), log=True),
            Plot("Accuracy", "share of pairs", ("accuracy/mean", "*/accuracy")),
            Plot("Margin of the pairs", "nats", ("pairs/margin_nats", "eval/margin_nats")),
            Plot("Log-ratio to the reference", "nats per response", ("pairs/*_log_ratio_nats",)),
            Plot("Beta of the preference loss", "reward per nat", ("dpo/beta",)),
            Plot("KL to the loss's reference", "nats per response", ("kl/loss_ref_nats_per_response",)),
        ),
        "Diversity, length and held-out texts": (
            Plot("Different tokens and pairs", "share of all", ("eval/distinct_1", "eval/distinct_2",
                                                              "eval/distinct_2_adjusted")),
            Plot("Different pairs of tokens", "share of all", ("eval/distinct_2_per_input",
                                                              "eval/distinct_2_across_input")),
            Plot("Alike", "0 to 1", ("eval/self_bleu", "eval/duplicate_fraction")),
            Plot("Entropy", "nats per token", ("policy/entropy_nats_per_token", "eval/entropy_nats_per_token")),
            Plot("Length", "tokens per response", ("response/tokens", "eval/response_tokens")),
            Plot("Responses that end", "share", ("eval/end_fraction",)),
            Plot("Alignment tax", "nats per token", ("eval/tax_nats_per_token",), zero=True),
            Plot("Held-out perplexity", "perplexity", ("eval/perplexity",)),
        ),
        "Updates and trust region": (
            Plot("KL of one update", "nats per response",
                 ("kl/step_nats_per_response", "kl/step_limit*", "trpo/radius*"), log=True, limited="step"),
            Plot("Gain of the surrogate", "score", ("trpo/predicted_gain", "trpo/gain", "trpo/last_gain*")),
            Plot("Damping", "× mean curvature", ("trpo/damping",), log=True),
            Plot("Residual of conjugate gradients", "share of the gradient", ("trpo/cg_residual",), log=True),
            Plot("Tries of the line search", "number", ("trpo/line_search_tries", "trpo/accepted")),
            Plot("Clipped tokens", "share", ("ppo/clip_fraction",)),
            Plot("Learning rate", "learning rate", ("optim/lr",), log=True),
            Plot("Returns foretold by the value function", "share of their variance", ("*/value_explained",)),
        ),
    }


COMPARED_CURVES = {      # pictures of a comparison: one metric of every run in each
    "KL and score": (
        Plot("KL to the reference", "nats per response", ("kl/ref_nats_per_response", "eval/kl_ref_nats_per_response"),
             limited="ref"),
        Plot("Score", "score", ("score/mean", "eval/score_mean")),
        Plot("Gold score", "score, never trained on", ("eval/gold_mean",)),
        Plot("Win rate over the reference", "share, a tie ½", ("eval/win_rate",)),
        Plot("Proxy", "sd of the reference", ("eval/score_z",)),
        Plot("Gold", "sd of the reference", ("eval/gold_z",)),
        Plot("Price of one nat (beta)", "score per nat", ("kl/beta",), log=True),
        Plot("Loss", "loss", ("loss/mean", "eval/loss"), log=True),
        Plot("Accuracy", "share of pairs", ("accuracy/mean", "eval/accuracy")),
    ),
    "Diversity, length and held-out texts": (
        Plot("Different pairs of tokens, adjusted", "share of all", ("eval/distinct_2_adjusted",)),
        Plot("Likeness to each other (self-BLEU)", "0 to 1", ("eval/self_bleu",)),
        Plot("Entropy", "nats per token", ("policy/entropy_nats_per_token", "eval/entropy_nats_per_token")),
        Plot("Length", "tokens per response", ("response/tokens", "eval/response_tokens")),
        Plot("Alignment tax", "nats per token", ("eval/tax_nats_per_token",)),
    ),
}


@names_as_they_are()
def draw(plot: Plot, recorded: Recorded, limits: KLLimits) -> "Figure | None":
    """One picture; None if nothing of it was measured while the run went on, or only once, or as 0."""
    shown = [(name, recorded.series(name)) for name in _measured_names(plot, recorded)]
    values = [value for _, series in shown for _, value, _ in series]
    if not any(values) or (max(len(series) for _, series in shown) == 1 and recorded.last_step > 1):
        return None      # nothing but 0: a price that was never asked, a cap that was never met
    figure, axes = make_axes()
    for colour, (name, series) in zip(COLOURS, shown, strict=False):
        if series:
            label = CURVE_NAMES.get(name, visible(name))
            draw_series(axes, series, colour, label, faint=name in TRAINING and len(shown) > 1)
        _draw_saved(axes, recorded, name, colour, "final")
        level = recorded.reference(name)
        if level is not None and not plot.zero:
            draw_level(axes, level, colour, "reference", ":")
    if plot.zero:
        draw_level(axes, 0.0, INK, "reference", ":")
    if plot.limited == "step" and limits.max_step_kl is not None:
        draw_level(axes, limits.max_step_kl, TARGET, "largest allowed")
    if plot.limited == "ref" and limits.target is not None:
        low, high = ((1 + sign * TOLERANCE) * limits.target for sign in (-1, 1))
        axes.axhspan(low, high, color=TARGET, alpha=0.18, linewidth=0, label=f"target ± {100 * TOLERANCE:.0f} %")
        axes.axhline(limits.target, color=TARGET, linestyle="--", linewidth=1.2)
    if plot.limited == "ref" and limits.hard_cap is not None:
        draw_level(axes, limits.hard_cap, CAP, "hard cap", "-")
    if plot.log:
        set_log(axes, values)
    finish_axes(axes, unit=plot.unit, last_step=recorded.last_step)
    return figure


def _measured_names(plot: Plot, recorded: Recorded) -> list[str]:
    """What the plot's patterns name among what was measured, in their order."""
    names = recorded.names
    return list(dict.fromkeys(name for pattern in plot.patterns for name in names if fnmatch(name, pattern)))


def _draw_saved(axes: "Axes", recorded: Recorded, name: str, colour: str, label: str) -> float | None:
    """Draw what the policy that was saved measured, with its interval; return it, None where it was not measured."""
    value, error = recorded.final.get(name), recorded.final.get(STANDARD_ERRORS.get(name, ""))
    if not is_number(value):
        return None
    step = recorded.last_step if recorded.final_step is None else recorded.final_step
    axes.errorbar(
        [step], [value], yerr=[Z95 * error] if is_number(error) and error else None, color=colour, marker="D",
        markersize=6.5, markeredgecolor=INK, markeredgewidth=0.8, elinewidth=1.4, capsize=3, linestyle="none",
        label=label, zorder=4,
    )
    return value


@names_as_they_are()
def draw_together(plot: Plot, runs: dict[str, Recorded], targets: dict[str, float]) -> "Figure | None":
    """One curve of each run in one picture, of the same metric; None if no run has any.

    Of the plot's metrics it is the one that most runs have ``ENOUGH`` points of, the last of several.
    """
    def points(name: str) -> int:
        return sum(min(ENOUGH, len(recorded.series(name))) for recorded in runs.values())

    name = max(reversed(plot.patterns), key=points)
    figure, axes = make_axes()
    drawn: list[float] = []
    for colour, (label, recorded) in zip(COLOURS, runs.items(), strict=False):
        series, shown = recorded.series(name), shown_in_legend(visible(label))
        if series:
            draw_series(axes, series, colour, shown)
            drawn += [value for _, value, _ in series]
        saved = _draw_saved(axes, recorded, plot.patterns[-1], colour, "_saved" if series else shown)
        drawn += [] if saved is None else [saved]
        if label in targets:
            draw_level(axes, targets[label], colour, "_target")
    if not drawn:
        return None
    if plot.log:
        set_log(axes, drawn)
    kind = f", {CURVE_NAMES[name]}" if len(plot.patterns) > 1 else ""
    finish_axes(axes, unit=plot.unit + kind, last_step=max(recorded.last_step for recorded in runs.values()))
    return figure
