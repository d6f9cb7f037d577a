"""A reward that can be checked: 1 for the right answer to a sum, 0 for anything else.

The prompt alone would do for sums; the answer is read from the data row all the same, as it has to be where a prompt
does not say it: a third parameter called rows gets the row of each prompt, with all its fields.
"""

import re
from typing import Any


def right(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Whether the first number of each response is the "answer" of its row.

    Examples:
        " 7" to {"prompt": "3 + 4 =", "answer": "7"}    →  1.0
        " 71"                                           →  0.0
    """
    return [float(_first_number(response) == row["answer"]) for response, row in zip(responses, rows, strict=True)]


def _first_number(response: str) -> str | None:
    found = re.search(r"\d+", response)
    return found[0] if found else None
