"""Runs as points of reward against KL: what was measured of each, and which curve it is on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kltune.errors import CheckpointError
from kltune.lm.data.documents import Projection, Result, RunRecord, Sweep
from kltune.lm.data.foreign import check_shape
from kltune.recipe import flat_settings, load_recipe
from kltune.report.figures import TOLERANCE
from kltune.report.outcome import final_figures
from kltune.run.files import is_finished, read_json, read_metrics, readable

SETTING_KEYS = ("kl.target", "kl.beta", "dpo.beta", "kl.hard_cap")      # what sets a run's KL; the rest names its curve
NO_DIFFERENCE = ("run.seed", "run.save_every", "run.eval_every", "run.device", "run.threads", "optim.micro_batch_size")
SAME_REFERENCE = {"sha256": "weights", "tokenizer_sha256": "tokenizer", "template_sha256": "template"}


@dataclass(frozen=True)
class FrontierSource:
    """Where points come from: a finished run, or the curve of ``kltune project``.

    path: as it is named to the user. folder: of the run, None for a curve. settings: of its recipe by dotted key, {}
    where none is known. document: result.json, or project.json. rewards: identities of what scored it.
    """

    path: str
    folder: Path | None
    reference: dict[str, Any]
    settings: dict[str, Any]
    document: dict[str, Any]
    rewards: list[dict[str, Any]]


@dataclass(frozen=True)
class FrontierPoint:
    """A policy: its KL(policy ‖ reference) in nats per response, and how it was scored; None where not measured.

    curve, setting: which line it is on, and where. cluster: the run it comes from. alpha: the share of its adapter.
    """

    run: str
    cluster: str
    curve: str
    setting: str
    seed: int | None
    alpha: float
    kl: float
    kl_stderr: float | None
    kl_ci95: tuple[float, float] | None
    score: float | None
    score_stderr: float | None
    gold: float | None = None
    gold_stderr: float | None = None
    steps_to_target: int | None = None
    win_rate: float | None = None       # over the reference
    win_rate_stderr: float | None = None


def find_sources(paths: Sequence[str]) -> list[FrontierSource]:
    """Runs, the finished points of sweeps, and curves, each once.

    Raises:
        CheckpointError: a path is none of these, or a run that has not finished.
    """
    sources: dict[Path, FrontierSource] = {}
    for path in paths:
        with readable(path):
            for source in _sources_at(path):
                sources.setdefault(Path(source.path).resolve(), source)
    return list(sources.values())


def _sources_at(path: str) -> list[FrontierSource]:
    folder = Path(path)
    if not (folder / "sweep.json").is_file():
        return [_run_source(path) if (folder / "run.json").is_file() else _curve_source(path)]
    rows = read_json(folder / "sweep.json", Sweep)["points"]
    done = [row["name"] for row in rows if is_finished(folder / row["name"])]
    if not done:
        raise CheckpointError(f"{path}: no point of this sweep has finished yet.")
    return [_run_source(str(folder / name)) for name in done]


def _run_source(path: str) -> FrontierSource:
    folder = Path(path)
    record = read_json(folder / "run.json", RunRecord)
    if not is_finished(folder):
        raise CheckpointError(f"{path} has not finished; wanted runs with a result.json.")
    lacking = [name for name in ("path", *SAME_REFERENCE) if not (record.get("reference") or {}).get(name)]
    if lacking:
        raise CheckpointError(f"{folder / 'run.json'}: reference.{lacking[0]} is missing.")
    settings = flat_settings(load_recipe(folder / "recipe.yaml"))
    if settings["stage"] == "reward":
        raise CheckpointError(f"{path} is a reward model, which says nothing and so has no KL; wanted policies.")
    return FrontierSource(
        path, folder, record["reference"], settings, read_json(folder / "result.json", Result),
        record.get("rewards", []),
    )


def _curve_source(path: str) -> FrontierSource:
    file = Path(path) / "project.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise CheckpointError(
            f"{path} is no run, no sweep and no curve: wanted a folder with run.json, sweep.json or project.json, or "
            "the JSON of kltune project --curve."
        )
    document = read_json(file)
    known = isinstance(document, dict) and document.get("schema") == "kltune.project/1"
    if known:
        check_shape(document, Projection, CheckpointError, str(file))
    if not known or all(look["purpose"] != "curve" for look in document["looks"]):
        raise CheckpointError(f"{path} holds no curve; kltune project CHECKPOINT --curve measures one.")
    checkpoint = Path(document["checkpoint"])
    run = checkpoint if (checkpoint / "recipe.yaml").is_file() else checkpoint.parent
    known = (run / "run.json").is_file() and (run / "recipe.yaml").is_file()
    settings = flat_settings(load_recipe(run / "recipe.yaml")) if known else {}
    return FrontierSource(path, None, document["reference"], settings, document, document.get("rewards") or [])


def check_one_reference(sources: Sequence[FrontierSource]) -> None:
    """Raise a CheckpointError that names the runs of each reference, where there are several: KLs do not compare."""
    groups: list[list[FrontierSource]] = []
    for source in sources:
        alike = next((group for group in groups if _one_reference(source.reference, group[0].reference)), None)
        groups.append([source]) if alike is None else alike.append(source)
    if len(groups) > 1:
        lines = "".join(
            "\n  " + ", ".join(f"{what} {group[0].reference[name][:12]}" for name, what in SAME_REFERENCE.items())
            + f": {', '.join(source.path for source in group)}" for group in groups
        )
        first = groups[0][0].reference
        others = dict.fromkeys(name for group in groups[1:] for name in _other_settings(first, group[0].reference))
        lines += f"\n  and not alike in {', '.join(others)}" if others else ""
        raise CheckpointError(f"These were not measured against one reference, so their KLs do not compare:{lines}")


def _one_reference(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name] == other[name] for name in SAME_REFERENCE) and not _other_settings(one, other)


def _other_settings(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Settings of the model, and ends of a response, that both recorded and that are not the same."""
    pairs = [(one.get(part) or {}, other.get(part) or {}) for part in ("config", "ends")]
    return [name for a, b in pairs for name in sorted(a.keys() & b.keys()) if a[name] != b[name]]


def identities_of(rewards: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What tells rewards from others, wherever their files are: a checksum, and which function of the file it is."""
    return [
        {name: reward[name] for name in sorted(reward) if name not in ("name", "path") or "sha256" not in reward}
        | ({"function": reward["path"].rpartition(":")[2]} if reward.get("kind") == "function" else {})
        for reward in rewards
    ]


def check_one_reward(sources: Sequence[FrontierSource]) -> None:
    """Raise a CheckpointError that names the runs of each reward, where there are several: scores do not compare."""
    groups: dict[str, list[str]] = {}
    for source in sources:
        if source.rewards:
            identity = repr([identities_of(source.rewards), source.settings.get("sampling.missing_end_penalty")])
            groups.setdefault(identity, []).append(source.path)
    if len(groups) > 1:
        lines = "".join(f"\n  {', '.join(paths)}" for paths in groups.values())
        raise CheckpointError(
            f"These were scored by different rewards, so their scores do not compare:{lines}\nGive --recipe R.yaml to "
            "score them all afresh by the rewards of one recipe."
        )


def judges_of_wins(sources: Sequence[FrontierSource]) -> int:
    """How many different judges the win rates of runs are by."""
    judged = [source for source in sources if source.document.get("win_rate") is not None]
    return len({repr([source.settings[key] for key in sorted(source.settings) if key.startswith("eval.judge")])
                for source in judged})


def differing_measures(sources: Sequence[FrontierSource]) -> list[str]:
    """Notes on runs whose KL was measured in another way than the first one's."""
    ways = [_way_of_measuring(source) for source in sources]
    return [
        f"{source.path} was measured with {way}; the first with {ways[0]}"
        for source, way in zip(sources, ways, strict=True) if way != ways[0]
    ]


def _way_of_measuring(source: FrontierSource) -> str:
    settings = source.settings
    way = {
        name: settings.get(f"sampling.{name}", source.document.get(name)) for name in ("max_new_tokens", "temperature")
    }
    prompts = (settings.get(key) for key in ("eval.prompts", "eval.pairs", "data.prompts", "data.pairs"))
    way["prompts"] = next((name for name in prompts if name is not None), None)
    return ", ".join(f"{name} {value}" for name, value in way.items())


def points_of(sources: Sequence[FrontierSource]) -> list[FrontierPoint]:
    """All points, each on a curve that its recipe names."""
    names = curve_names([source for source in sources if source.folder is not None])
    points: list[FrontierPoint] = []
    for source in sources:
        if source.folder is not None:
            curve, setting = names[source.path]
            figures = final_figures(source.document)
            if figures["kl"] is not None:
                figures = {name: figures[name] for name in figures if not name.startswith("reference_")}
                points.append(FrontierPoint(
                    source.path, source.path, curve, setting, source.settings["run.seed"],
                    source.document.get("alpha") or 1.0, **figures, steps_to_target=steps_to_target(source),
                ))
        else:
            points += _curve_points(source)
    return points


def _curve_points(source: FrontierSource) -> list[FrontierPoint]:
    checkpoint, settings = source.document["checkpoint"], source.settings
    curve = f"{family(settings)}, {_settings_text(settings, [setting_key(settings)])}" if settings else checkpoint
    return [
        FrontierPoint(
            source.path, checkpoint, f"alpha curve of {curve}", f"alpha={look['alpha']:g}", settings.get("run.seed"),
            look["alpha"], look["nats_per_response"], look["stderr"], look["ci"], look["score"], look["score_stderr"],
        )
        for look in source.document["looks"]
        if look["purpose"] == "curve" and look["alpha"] > 0.0
    ]


def family(settings: dict[str, Any]) -> str:
    """Stage and control of a run, which begin the name of its curve."""
    stage = settings["stage"]
    if stage == "dpo":
        loss, online = settings["dpo.loss"], settings["dpo.source"] == "online"
        words = [stage, *(["online"] if online else []), *([loss] if loss != "sigmoid" else [])]
        return " ".join([*words, *(["target"] if settings["kl.control"] == "target" else [])])
    if stage == "trpo" and settings["kl.control"] == "target":
        return stage
    return f"{stage} {settings['kl.control']}" if "kl.control" in settings else stage


def setting_key(settings: dict[str, Any]) -> str:
    """The key that sets how far a run goes."""
    if settings.get("kl.control") == "target":
        return "kl.target"
    if settings["stage"] == "dpo" and settings["kl.beta"] == 0.0:
        return "dpo.beta"
    return "kl.beta" if "kl.beta" in settings else "run.steps"


def curve_names(sources: Sequence[FrontierSource]) -> dict[str, tuple[str, str]]:
    """The names of each run's curve and of its setting on it.

    Runs of one family that differ in more than what sets the KL, and the seed, are on curves of their own.
    """
    families: dict[str, list[FrontierSource]] = {}
    for source in sources:
        families.setdefault(family(source.settings), []).append(source)
    names = {}
    for name, members in families.items():
        keys = sorted({key for member in members for key in member.settings})
        varying = [
            key for key in keys
            if key not in NO_DIFFERENCE and not key.startswith("eval.")
            and len({repr(member.settings.get(key)) for member in members}) > 1
        ]
        for member in members:
            own_key = setting_key(member.settings)
            others = [key for key in varying if key not in SETTING_KEYS and key != own_key]
            keys_of_setting = list(dict.fromkeys([own_key, *(key for key in varying if key in SETTING_KEYS)]))
            curve = ", ".join([name, *([_settings_text(member.settings, others)] if others else [])])
            names[member.path] = curve, _settings_text(member.settings, keys_of_setting)
    return names


def _settings_text(settings: dict[str, Any], keys: Sequence[str]) -> str:
    values = {key: settings.get(key) for key in keys}
    return ", ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                     for key, value in values.items())


def steps_to_target(source: FrontierSource) -> int | None:
    """Steps after which a run's KL first came within 15 % of its target; None without one, or if it never did."""
    target = source.document.get("target")
    if target is None:
        return None
    name = f"kl/ref_{source.document.get('unit', 'nats_per_response')}"
    for row in read_metrics(source.folder):
        if row.get(name) is not None and row[name] >= (1.0 - TOLERANCE) * target:
            return row["step"]
    return None
