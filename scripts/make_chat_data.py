"""Make the data of the recipes in recipes/smollm2 from transcripts of hh-rlhf, or others with Human: and Assistant:.

    python scripts/make_chat_data.py TRANSCRIPTS.jsonl FOLDER [--held-out 100]

Reads rows of {"chosen", "rejected"} and writes pairs.jsonl, prompts.jsonl and texts.jsonl, and of the last rows
held_out_pairs.jsonl, held_out_prompts.jsonl and held_out_texts.jsonl; a text is the chosen side. Rows with an empty
turn are left out, and counted.
"""

import argparse
import json
import sys
from pathlib import Path

from kltune.lm.data.layouts import turns
from kltune.lm.data.rows import RowFault


def main() -> None:
    """Read the arguments and write the files; what was left out goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("transcripts", type=Path, help='rows of {"chosen", "rejected"}')
    parser.add_argument("folder", type=Path, help="folder to write into")
    parser.add_argument("--held-out", type=int, default=100, help="last rows, whose prompts are not trained on")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.transcripts.read_text(encoding="utf-8").splitlines()]
    whole = [sides for row in rows if (sides := conversations(row)) is not None]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    held_out = whole[-arguments.held_out :]
    asked = [prompt for prompt, *_ in held_out]
    for prefix, part in ("", [row for row in whole if row[0] not in asked]), ("held_out_", held_out):
        write(arguments.folder / f"{prefix}pairs.jsonl", [{"chosen": a, "rejected": b} for _, a, b in part])
        write(arguments.folder / f"{prefix}prompts.jsonl", [{"messages": prompt} for prompt, *_ in part])
        write(arguments.folder / f"{prefix}texts.jsonl", [{"messages": chosen} for _, chosen, _ in part])
    print(f"{len(rows) - len(whole)} of {len(rows)} rows were left out", file=sys.stderr)


def conversations(row: dict[str, str]) -> tuple[list[dict], list[dict], list[dict]] | None:
    """The prompt of a pair and both its sides as messages; None where one is empty or they are asked otherwise."""
    try:
        chosen, rejected = (turns(row[name], name) for name in ("chosen", "rejected"))
    except RowFault:
        return None
    same = chosen[:-1] == rejected[:-1] and chosen != rejected and chosen[-1]["role"] == "assistant"
    return (chosen[:-1], chosen, rejected) if same else None


def write(path: Path, rows: list[dict]) -> None:
    """Rows as lines of JSON."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
