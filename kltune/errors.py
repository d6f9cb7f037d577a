"""What can go wrong and be put right by the user, each with the exit code that scripts rely on.

Anything else that escapes is a bug in kltune: exit code 1, with a traceback.
"""

import re
from dataclasses import dataclass

# How libraries and drivers say that there is no memory left, on the machine or on a device. A handle of cuBLAS that
# cannot be made is that too: it is the first to want memory of its own.
NO_MEMORY = re.compile(
    r"out ?of ?memory|alloc(ation)?_failed|(can't|cannot|unable to|failed to) allocate|not enough memory|bad_alloc"
    r"|MemoryAllocation|CUBLAS_STATUS_NOT_INITIALIZED", re.IGNORECASE
)


class KltuneError(Exception):
    """Something the user can put right; shown without a traceback.

    heard: all processes of a run have it. unheard: the first of them does not, and cannot say it. process: of several,
    which one failed and while it did what; "" where that says nothing.
    """

    exit_code = 1
    heard = unheard = False
    process = ""


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


class SamplerError(InputError):
    """A server that samples for the policy answers with other weights, or otherwise than it was asked."""


class CheckpointError(InputError):
    """A checkpoint is missing, damaged, or belongs to another reference."""


class DivergedError(KltuneError, RuntimeError):
    """A number stopped being finite, or the policy passed its hard cap."""

    exit_code = 6


class ScoreOverflow(DivergedError):
    """Scores are finite one by one and not together; the policy that they are of is sound."""


class StorageError(KltuneError, OSError):
    """Nothing more can be written, or memory ran out."""

    exit_code = 74


class OutOfMemory(StorageError):
    """Memory ran out, on the machine or on a device."""


def failed_process(error: BaseException | None) -> str:
    """``process`` of an error, or of one that it came of."""
    return "" if error is None else getattr(error, "process", "") or failed_process(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception that is none of these says that memory ran out, by its kind or its words."""
    if isinstance(error, KltuneError):
        return False
    # by name: torch has classes of its own, and importing it to compare them would slow every other error
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return NO_MEMORY.search(str(error)) is not None


class BusyError(KltuneError, RuntimeError):
    """The output folder is in use by another run."""

    exit_code = 75


class JudgeError(KltuneError, RuntimeError):
    """An AI judge does not answer: nothing is wrong with the run, which goes on once the judge is back."""

    exit_code = 75      # as EX_TEMPFAIL: try again later


class ServerError(KltuneError, RuntimeError):
    """A server that samples for the policy does not answer: the run goes on once it is back."""

    exit_code = 75


class PeerError(KltuneError, RuntimeError):
    """Another process of the same run is gone, late, or computes something else."""

    exit_code = 75      # what became of that one is said, and decides the code of the whole


GOES_ON_LATER = JudgeError, PeerError, ServerError       # of a run with which nothing is wrong


class Interrupted(KltuneError):
    """A signal asked the run to stop; a checkpoint was saved first."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message, signal_number)      # both: it is made again from them in another process
        self.exit_code = 128 + signal_number      # 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 138 for SIGUSR1

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class ExitCode:
    """What an exit code means, what to do about it, and a command that can end with it."""

    code: int
    meaning: str
    to_do: str
    example: str


EXIT_CODES = {entry.code: entry for entry in (
    ExitCode(
        0, "done; of eval-kl --max-kl: the budget holds at the stated confidence; of a finished run that is started "
        "again: nothing was left to do",
        "nothing", "kltune eval-kl runs/ppo --max-kl 8",
    ),
    ExitCode(
        1, "a bug in kltune; no other code comes with a traceback",
        "report it with its traceback; --resume goes on from the run's newest checkpoint", "any command",
    ),
    ExitCode(
        2, "the arguments or the recipe are wrong; nothing was trained",
        "correct what the message names: all faults of a recipe are listed at once, each with its line",
        "kltune recipe check my.yaml",
    ),
    ExitCode(
        3, "eval-kl --max-kl: over the budget at the stated confidence, the whole interval lies above it",
        "scale the adapter back with kltune project, or train with a lower kl.target or with kl.hard_cap",
        "kltune eval-kl runs/ppo --max-kl 4",
    ),
    ExitCode(
        4, "eval-kl --max-kl: undecided, the budget lies within the confidence interval",
        "ask for more --responses (the message says about how many more would decide it), or let --auto keep sampling; "
        "where it says that more answers to the same prompts do not help, give more --prompts",
        "kltune eval-kl runs/ppo --max-kl 6 --responses 64",
    ),
    ExitCode(
        5, "something that was read is wrong: rows of data, a reward function or its scores, a model or tokenizer, a "
        "damaged checkpoint, or one of another reference",
        "correct the file, row or function that the message names", "kltune ppo --recipe my.yaml",
    ),
    ExitCode(
        6, "the run diverged: a number stopped being finite, or kl.hard_cap was passed with on_cap: stop, or nothing "
        "within the cap was left to call final; nothing bad was saved",
        "lower optim.lr, or raise kl.beta or kl.hard_cap, and start again under another --output",
        "kltune ppo --recipe my.yaml --set kl.hard_cap=8 --set kl.on_cap=stop",
    ),
    ExitCode(
        74, "nothing more can be written (the disk is full, a folder is read-only), or memory ran out",
        "make room on the disk; for memory lower the key that the message names; optim.micro_batch_size and "
        "run.memory_fraction change no result, nor does optim.checkpoint_layers: always, and with these --resume goes "
        "on; kltune STAGE R.yaml --dry-run says what a run takes", "kltune ppo --recipe my.yaml --resume",
    ),
    ExitCode(
        75, "try again later: another run has the output folder, an AI judge or a server does not answer, or another "
        "process of the run is gone or late; all is saved",
        "wait for the other run or choose another --output; once the judge answers again, --resume",
        "kltune ppo judged.yaml --resume",
    ),
    ExitCode(
        129, "stopped by SIGHUP, as when its terminal closes; a stage finishes its step and saves a checkpoint first",
        "the same command with --resume goes on from there; nohup lets it go on without a terminal",
        "kltune ppo --recipe my.yaml --resume",
    ),
    ExitCode(
        130, "stopped by Ctrl-C (SIGINT); a stage finishes its step and saves a checkpoint first, a second Ctrl-C ends "
        "it at once", "the same command with --resume goes on from there", "kltune ppo --recipe my.yaml --resume",
    ),
    ExitCode(
        137, "killed (SIGKILL), most often by the system because memory ran out; of kltune sweep: a point was killed",
        "use less memory, as for 74, or fewer --jobs; the same command with --resume, a sweep without it, goes on from "
        "the newest checkpoint", "kltune sweep --recipe my.yaml --over kl.target=3,6 --output sweeps/a --jobs 4",
    ),
    ExitCode(
        138, "stopped by SIGUSR1, which schedulers send before a time limit; a stage finishes its step and saves a "
        "checkpoint first", "the same command with --resume goes on from there", "kltune ppo --recipe my.yaml --resume",
    ),
    ExitCode(
        143, "stopped by SIGTERM, which schedulers send; a stage finishes its step and saves a checkpoint first",
        "the same command with --resume goes on from there", "kltune ppo --recipe my.yaml --resume",
    ),
)}
