"""kltune as ``python -m tests.driven ARGUMENTS``: models of any size are shared among processes, and faults happen.

FAULT in the environment is JSON: what happens, in which phase, in which process, and after how many times it was passed.
"""

import json
import os
import sys
from collections.abc import Callable

from kltune.cli import main
from kltune.core import ranks
from kltune.lm.fast import memory

memory.PASSES_PER_PIECE = memory.PASSES_PER_SAMPLE = 0      # a tiny model costs next to nothing beside a pass

if __name__ == "__main__":
    main()
