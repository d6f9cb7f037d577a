"""The processes of one run: each computes its share, and all of them know the whole of every result.

Every process (rank) holds the same plan, random numbers, controller and optimizer, and takes the same decisions; only
forward and backward passes are divided. What is divided falls into parts by a plan that knows nothing of how many
processes there are; results come back in the plan's order, and sums over parts are taken in float64, where float32
terms add up exactly unless they are 2²⁹ apart. So 1, 2 or 3 processes of a CPU give the same bits.

A process that fails says so in the place where the others wait for its results, and they fail with it, of the same
error. Alone, as one process is, nothing here costs anything.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from kltune import errors
from kltune.errors import DivergedError, KltuneError, PeerError, RecipeError, StorageError

Part = TypeVar("Part")
Row = tuple[Tensor | None, ...]
NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")     # what torchrun tells each process
TIMEOUT = 1800.0        # seconds that one waits for another, unless a recipe says otherwise
FAREWELL_SECONDS = 10.0     # for which a process that fails waits to be heard
GONE = re.compile(r"[Rr]anks? ([\d, ]+) (?:failed|timed out)")


@dataclass
class _Here:
    """This process among the others.

    alone: what it does at the moment is no share of theirs. talk: through
    which they tell each other, on CPUs; gradients go where they are.
    """

    rank: int = 0
    size: int = 1
    timeout: float = 0.0
    phase: str = "starting"
    alone: int = 0
    talk: dist.ProcessGroup | None = None


_here = _Here()


def size() -> int:
    """How many processes share the work."""
    return _here.size


def beside() -> int:
    """How many processes of the run share this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if _here.size > 1 else 1


def is_first() -> bool:
    """Whether this process is the one that writes and prints: rank 0, or the only one."""
    return _here.rank == 0


@contextmanager
def joined(processes: int | str, timeout: float, device: str) -> Iterator[None]:
    """Within: this process works with the others that were started with it, if there are any.

    Args:
        processes: as the recipe has it.
        timeout: seconds that one waits for another.
        device: as the recipe has it; with a GPU for each process, gradients are added up by NCCL.

    Raises:
        RecipeError: they are not as many as the recipe wants. PeerError: they did not find each other.
    """
    if not all(os.environ.get(name) for name in NAMES) or _here.size > 1:
        if processes not in (1, "auto") and _here.size == 1:
            raise RecipeError(
                f"run.processes: found {processes} in a program that is one process; the command kltune starts as many."
            )
        yield
        return
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if processes not in (1, "auto", count):
        raise RecipeError(f"run.processes: found {processes}, but {count} processes were started (WORLD_SIZE).")
    on_gpu, seconds = device != "cpu" and torch.cuda.is_available(), timedelta(seconds=timeout)
    if on_gpu:
        _take_gpu(int(os.environ.get("LOCAL_RANK", 0)), device)
    _here.rank, _here.timeout, _here.phase = rank, timeout, "starting"
    try:
        with _heard(count):
            dist.init_process_group("nccl" if on_gpu else "gloo", timeout=seconds, rank=rank, world_size=count)
            _here.talk = dist.new_group(backend="gloo", timeout=seconds)
        _here.size = count
        yield
        gathered(lambda: None)     # nobody leaves while another still reads what it sent, or has yet to fail
    except Exception as error:
        _say(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        _here.rank, _here.size = 0, 1


def _take_gpu(place: int, device: str) -> None:
    """Compute on the GPU of this process's place on its machine; RecipeError where there is none."""
    there = torch.cuda.device_count()
    if place >= there or device not in ("auto", "cuda"):
        raise RecipeError(
            f"run.processes: found process {place + 1} of a machine with {there} GPUs, and run.device: {device}; "
            "wanted a GPU for each process and run.device: auto, or run.device: cpu."
        )
    torch.cuda.set_device(place)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Within: what a message calls this part of the work."""
    before, _here.phase = _here.phase, name
    yield
    _here.phase = before        # an error that passes leaves the name of where it came from


def spread(
    parts: Sequence[Part], work: Callable[[Part], Row], costs: Sequence[float] | None = None,
    idle: Callable[[Part], None] | None = None,
) -> list[Row]:
    """What ``work`` makes of each part, in the order of the parts; each process does its share, all know all of it.

    Args:
        parts: the same in every process.
        work: gives a fixed number of tensors, or None in their places.
        costs: of each part, any unit; the same for all where left out.
        idle: what a process does that has no part left while another has: where a pass of one is a pass of all. Then
            one that fails cannot say so, and is only seen to be gone.

    Raises:
        What ``work`` raises of the first part that fails, in every process. PeerError: another process is gone.
    """
    if _here.size == 1 or _here.alone:
        return [work(part) for part in parts]
    done: dict[str, Tensor] = {"of": torch.tensor(_here.rank)}
    width, place = 0, 0
    try:
        with _working_alone():
            dealt = shares(costs or [1.0] * len(parts), _here.size)
            for place in dealt[_here.rank]:
                row = work(parts[place])
                width = len(row)
                done |= {f"{place}.{at}": tensor for at, tensor in enumerate(row) if tensor is not None}
                done[f"{place}"] = torch.tensor(width)
            for _ in range(max(map(len, dealt)) - len(dealt[_here.rank]) if idle is not None else 0):
                idle(parts[-1])
    except Exception as error:
        if idle is not None:
            error.heard = error.unheard = True
            raise
        failure = _first_failure(_exchange(_failure(error, place)), error)
        if failure is error:        # which is not its own cause
            raise
        raise failure from error
    payloads = _exchange(save({name: tensor.detach().cpu().contiguous() for name, tensor in done.items()}))
    if (failure := _first_failure(payloads)) is not None:
        raise failure
    found: dict[str, Tensor] = {}
    for payload in payloads:
        found |= load(payload)
    return [
        tuple(found.get(f"{place}.{at}") for at in range(int(found[f"{place}"]))) for place in range(len(parts))
    ]


def from_first(work: Callable[[], Any]) -> Any:
    """What ``work`` gives in the first process, where alone it is done: JSON values, or None. Raises as ``spread``."""
    ((told,),) = spread([work], lambda part: (_bytes(json.dumps(part()).encode()),))
    return json.loads(told.numpy().tobytes())


def gathered(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives in each process, by rank: JSON values. Raises as ``spread``."""
    if _here.size == 1 or _here.alone:
        return [work()]
    try:
        value = work()
    except Exception as error:
        failure = _first_failure(_exchange(_failure(error)), error)
        if failure is error:        # which is not its own cause
            raise
        raise failure from error
    payloads = _exchange(save({"value": _bytes(json.dumps(value).encode())}))
    if (failure := _first_failure(payloads)) is not None:
        raise failure
    return [json.loads(load(payload)["value"].numpy().tobytes()) for payload in payloads]


def expect_equal(what: str, work: Callable[[], str]) -> None:
    """Raise PeerError unless ``work`` gives the same in all processes; names the first that differs from rank 0."""
    values = gathered(work)
    wrong = [rank for rank, other in enumerate(values) if other != values[0]]
    if wrong:
        raise PeerError(
            f"process {wrong[0]} of {len(values)} holds another {what} than process 0: they no longer compute the "
            "same. Are their machines, libraries and files alike? The newest checkpoint is from before."
        )


def summed(vector: Tensor) -> Tensor:
    """The sum of a vector over the processes, which all give one of this shape; in place."""
    if _here.size > 1 and not _here.alone:
        with _heard():
            dist.all_reduce(vector)
    return vector


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Places of the parts that each of ``count`` processes takes: the dearest first, to whom has least to do."""
    loads, places = [0.0] * count, [[] for _ in range(count)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        least = loads.index(min(loads))
        loads[least] += costs[place]
        places[least].append(place)
    return places


@contextmanager
def _working_alone() -> Iterator[None]:
    _here.alone += 1
    try:
        yield
    finally:
        _here.alone -= 1


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _exchange(payload: bytes, timeout: float | None = None) -> list[bytes]:
    """Some bytes of each process, by rank; whoever does not come in time is named."""
    seconds = timeout or _here.timeout
    with _heard(seconds=seconds):
        dist.monitored_barrier(_here.talk, timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        sizes = [torch.zeros(1, dtype=torch.long) for _ in range(_here.size)]
        dist.all_gather(sizes, torch.tensor([len(payload)]), group=_here.talk)
        most = max(1, max(int(each) for each in sizes))
        rows = [torch.empty(most, dtype=torch.uint8) for _ in range(_here.size)]
        dist.all_gather(rows, _bytes(payload.ljust(most, b"\0")), group=_here.talk)
    return [row[: int(length)].numpy().tobytes() for row, length in zip(rows, sizes, strict=True)]


def _failure(error: Exception, place: int = -1) -> bytes:
    """An error as the others hear of it: its kind where a user can put it right, and what it says."""
    kind = next((cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__), None)
    kind = MemoryError.__name__ if errors.is_out_of_memory(error) else kind     # each says then what to do about it
    text = str(error) if kind is not None else f"{type(error).__name__}: {error}"
    code = getattr(error, "exit_code", 1)
    told = {"place": place, "rank": _here.rank, "kind": kind, "text": text, "code": code}
    return save({"failure": _bytes(json.dumps(told).encode())})


def _first_failure(payloads: Sequence[bytes], mine: Exception | None = None) -> Exception | None:
    """The error of the first part that failed, as all processes raise it; None if none did."""
    told = [load(payload) for payload in payloads if payload]
    failures = [json.loads(each["failure"].numpy().tobytes()) for each in told if "failure" in each]
    if not failures:
        return None
    first = min(failures, key=lambda each: (each["place"], each["rank"]))
    own = mine if first["rank"] == _here.rank and mine is not None else _rebuilt(first)
    own.heard = True
    return _of_process(own, first["rank"])


def _of_process(error: Exception, rank: int) -> Exception:
    """The error, with whose it is where it is that of a process, and not of what the run was given."""
    if isinstance(error, DivergedError | StorageError | MemoryError):
        error.process = errors.failed_process(error) or f"process {rank} of {_here.size}, while {_here.phase}: "
    return error


def _rebuilt(told: dict[str, Any]) -> KltuneError | MemoryError:
    if told["kind"] is None:
        return PeerError(f"process {told['rank']} of {_here.size} failed while {_here.phase}: {told['text']}")
    if told["kind"] == MemoryError.__name__:
        return MemoryError(told["text"])
    kind = getattr(errors, told["kind"])
    return kind(told["text"], told["code"] - 128) if kind is errors.Interrupted else kind(told["text"])


def _say(error: Exception) -> None:
    """Let the others hear of an error that they may not have; what they cannot hear they see, when this one is gone."""
    if getattr(error, "heard", False) or isinstance(error, PeerError):
        return
    try:
        payloads = [load(payload) for payload in _exchange(_failure(error), FAREWELL_SECONDS)]
    except PeerError:
        error.unheard = True
    else:
        error.heard = True
        if not all("failure" in payload for payload in payloads):       # else it is of what all know
            _of_process(error, _here.rank)


@contextmanager
def _heard(size: int = 0, seconds: float | None = None) -> Iterator[None]:
    """Within: that another process is gone, or late, is an error that says which and when.

    size: of the run, where it is still being put together. seconds: that are waited, if not those of the run.
    """
    count, began = size or _here.size, time.monotonic()
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # A barrier calls one that died late as well, at once.
        late = time.monotonic() - began >= 0.9 * (seconds or _here.timeout)
        named = GONE.search(str(error))
        others = f"process {named[1].strip(' ,')} of {count}" if named else "another process of this run"
        if count == 2:
            others = f"process {1 - _here.rank} of 2"
        elif late and _here.rank > 0:     # the first one is whom the others wait for
            others = f"process 0 of {count}, or one that it waits for,"
        ended = f"did not come within {_here.timeout:g} s (run.timeout_s)" if late else "ended"
        if size and not late:
            ended = f"was not found, {str(error).partition(chr(10))[0]},"
        lost = PeerError(f"{others} {ended} while {_here.phase}; --resume goes on from the newest checkpoint.")
        # Where the first one is gone somebody else has to say in the middle of what.
        lost.unheard = _here.rank == 1 or (late and _here.rank > 0)
        raise lost from error
