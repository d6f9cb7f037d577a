"""Make the tiny world that the recipes in recipes/tiny train on: a small language model and its data.

    python scripts/make_tiny_model.py [--output recipes/tiny] [--seed 0]

Takes about one minute on two cores and needs no network. ``kltune demo`` makes the same.
"""

import argparse
import sys
from pathlib import Path

from kltune.demo.world import make_tiny_world
from kltune.errors import KltuneError


def main() -> None:
    """Read the arguments and make the world; progress goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parents[1]
    parser.add_argument("--output", type=Path, default=here / "recipes" / "tiny", help="folder to write into")
    parser.add_argument("--seed", type=int, default=0, help="of texts, first weights and order of training")
    arguments = parser.parse_args()
    try:
        make_tiny_world(arguments.output, seed=arguments.seed, say=lambda text: print(text, file=sys.stderr))
    except KltuneError as fault:
        print(fault, file=sys.stderr)
        sys.exit(fault.exit_code)


if __name__ == "__main__":
    main()
