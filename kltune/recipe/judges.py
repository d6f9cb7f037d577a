"""Whether an AI judge can be asked as a recipe says: address, key, range, and what a preference is good for."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from kltune.recipe.faults import Clash
from kltune.recipe.rewards import JudgeReward, asks_for_pairs

LOOPBACK = ("localhost", "127.0.0.1", "::1")
NO_SCORES = "a preference between two responses is no score: write mode: score"


def judges(recipe: Any) -> Iterator[Clash]:
    """Every judge can be reached without giving its key away, and is asked for what the stage can use."""
    entries = {f"reward.{place}": entry for place, entry in enumerate(getattr(recipe, "reward", ()))}
    for key, entry in (entries | {"eval.gold": recipe.eval.gold}).items():
        if not isinstance(entry, JudgeReward):
            continue
        yield from address(key, entry)
        if entry.mode == "score" and entry.lowest >= entry.highest:
            yield ((f"{key}.lowest", f"{key}.highest"),
                   f"found {entry.lowest:g}, wanted less than highest, {entry.highest:g}")
        if asks_for_pairs(entry):
            yield from preference(recipe, key, entry)


def address(key: str, entry: JudgeReward) -> Iterator[Clash]:
    """A plain web address; with a key, one on which nobody can listen."""
    try:
        url = urlsplit(entry.url)
        sound = url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        url, sound = urlsplit(""), False
    if "@" in url.netloc or url.query or url.fragment:
        yield ((f"{key}.url",), "has a user, a query or a fragment in it, wanted a plain address; a key goes into an "
               "environment variable: write key_env: its name")
    elif not sound or " " in entry.url or not entry.url.isascii():
        yield (f"{key}.url",), f"found {entry.url}, wanted an address such as http://127.0.0.1:8000/v1"
    elif url.path.rstrip("/").endswith("/chat/completions"):
        yield (f"{key}.url",), f"found {entry.url}, wanted it without /chat/completions, which kltune adds"
    elif entry.key_env is not None and url.scheme == "http" and url.hostname not in LOOPBACK:
        yield ((f"{key}.key_env", f"{key}.url"), f"found a key for {entry.url}: over http it can be read on its way; "
               "write https://, or null for no key")


def preference(recipe: Any, key: str, entry: JudgeReward) -> Iterator[Clash]:
    """A preference makes pairs of dpo, alone; nothing else reads one."""
    if key == "eval.gold":
        yield (f"{key}.mode",), f"found pair, wanted score: {NO_SCORES}"
    elif recipe.stage != "dpo":
        yield ((f"{key}.mode",), "found pair, wanted score: among the answers to one prompt the mean of all "
               f"preferences is a half whatever the policy does, and {recipe.stage} wants a score that can rise; "
               "write mode: score, or stage: dpo with dpo.source: online")
    elif len(recipe.reward) > 1:
        yield (f"{key}.mode",), f"found pair beside other entries, wanted it alone: {NO_SCORES} to sum them"
    for name in ("lowest", "highest", "weight", "normalize"):
        if getattr(entry, name) != type(entry).model_fields[name].default:
            yield (f"{key}.{name}", f"{key}.mode"), "read only by mode: score; remove it"
