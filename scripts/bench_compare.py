"""What moved between two JSON documents of ``bench.py`` or ``bench_peers.py``."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("work", "settings", "tool", "model", "vocabulary", "responses", "rows_per_step")     # of a row, not measured
COUNTS = ("kernels", "waits", "largest")
FOLLOWS = ("range", "runs", "over_kltune", "tokens")   # from others, or how often
LEAST = 0.1      # share by which a figure without a range has to change
PLACES = ("machine", "threads")


def compare(before: Path, after: Path) -> int:
    """Print what moved from one document to the other; 1 if a count grew, which no busy machine explains, else 0."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    for name in ("commit", "date", *PLACES):
        print(f"{name:10}{old.get(name)} -> {new.get(name)}")
    if any(old.get(name) != new.get(name) for name in PLACES):
        print("Not of one kind of machine and number of threads: only counts and memory can be compared.")
    earlier, later = ({named(row): row for row in document["rows"]} for document in (old, new))
    for key in earlier.keys() ^ later.keys():
        print(f"only {'before' if key in earlier else 'after'}: {said(key)}")
    grew = False
    for key in (key for key in earlier if key in later):
        moved = list(moves(earlier[key], later[key]))
        grew |= any(name in COUNTS and now > then for name, then, now in moved)
        print(f"\n{said(key)}" + ("" if moved else ": nothing moved"))
        for name, then, now in moved:
            ratio = f"x {now / then:.2f}" if then else ""
            print(f"  {name.replace('_', ' '):28}{then:12.4g} -> {now:12.4g}  {ratio}")
    return int(grew)


def named(row: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What a row is of."""
    return tuple((name, row[name]) for name in NAMES if name in row)


def said(key: tuple[tuple[str, Any], ...]) -> str:
    """The same for people."""
    words = (value if isinstance(value, str) else f"{name.replace('_', ' ')} {value}" for name, value in key)
    return ", ".join(words)


def moves(before: dict[str, Any], after: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(what, then, now) of what differs by more than chance.

    A count by anything; seconds, and what follows from them, where the two ranges have nothing in common; memory, and
    seconds of phases, which have no range, by a tenth.
    """
    (low, high), (other_low, other_high) = (row.get("range", (0.0, float("inf"))) for row in (before, after))
    apart = other_low > high or low > other_high
    for name, then in before.items():
        now = after.get(name)
        if name in (*NAMES, *FOLLOWS) or not isinstance(then, int | float) or not isinstance(now, int | float):
            continue
        timed = name == "seconds" or name.endswith("per_second") or name == "share_of_floor"
        small = abs(now - then) <= LEAST * abs(then)
        if now != then and (apart if timed else name in COUNTS or not small):
            yield name, then, now
