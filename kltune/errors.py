"""What can go wrong and be put right by the user, each with the exit code that scripts rely on.

    KltuneError
    ├── RecipeError       2   arguments or recipe are wrong
    ├── InputError        5   something that was read is wrong
    │   ├── DataError         rows of prompts, texts or pairs
    │   ├── ScorerError       a reward function, model or judge
    │   ├── ModelError        weights, adapter or tokenizer
    │   └── CheckpointError   missing, damaged, or made with another reference
    ├── DivergedError     6   a number stopped being finite, or the hard cap was hit
    ├── StorageError     74   cannot write, or out of memory
    ├── BusyError        75   the output folder belongs to another run
    ├── JudgeError       75   an AI judge does not answer; everything up to then was saved
    └── Interrupted     130 / 143   SIGINT / SIGTERM, after a checkpoint was saved

Anything else that escapes is a bug in kltune: exit code 1, with a traceback.
"""


class KltuneError(Exception):
    """Something the user can put right; shown without a traceback."""

    exit_code = 1


class RecipeError(KltuneError, ValueError):
    """The arguments or the recipe do not describe a run."""

    exit_code = 2


class InputError(KltuneError, ValueError):
    """Something that was read is not as it should be."""

    exit_code = 5


class DataError(InputError):
    """Prompts, texts or pairs are not as promised."""


class ScorerError(InputError):
    """A reward function or reward model did not give one finite number per response."""


class ModelError(InputError):
    """A model, adapter or tokenizer cannot serve as policy or reference."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another reference."""


class DivergedError(KltuneError, RuntimeError):
    """A number stopped being finite, or the policy passed its hard cap."""

    exit_code = 6


class StorageError(KltuneError, OSError):
    """Nothing more can be written, or memory ran out."""

    exit_code = 74


class BusyError(KltuneError, RuntimeError):
    """The output folder is in use by another run."""

    exit_code = 75


class JudgeError(KltuneError, RuntimeError):
    """An AI judge does not answer: nothing is wrong with the run, which goes on once the judge is back."""

    exit_code = 75      # as EX_TEMPFAIL: try again later


class Interrupted(KltuneError):
    """A signal asked the run to stop; a checkpoint was saved first."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number      # 130 for SIGINT, 143 for SIGTERM
