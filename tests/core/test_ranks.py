"""Who does which part, what comes back, and what becomes of a part that fails."""

import os
import socket
from collections.abc import Callable

import pytest
import torch

from kltune.core import ranks
from kltune.errors import DivergedError, OutOfMemory, PeerError, StorageError, failed_process
from kltune.lm.machine.out_of_memory import SAMPLING, phase


def as_several(count: int, work: Callable[[int], str | None]) -> list[str]:
    """What ``work`` gives in each of several processes, by rank; of an error its type and what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, pids = [os.pipe() for _ in range(count)], []
    for rank, (_, end) in enumerate(pipes):
        if pid := os.fork():
            pids.append(pid)
            continue
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            torch.set_num_threads(1)
            try:
                with ranks.joined("auto", 20.0, "cpu"):
                    said = str(work(rank))
            except Exception as error:  # noqa: BLE001  it is what is looked at
                said = f"{type(error).__name__}: {error}"
            os.write(end, said.encode())
        finally:
            os._exit(0)
    for pid, (_, end) in zip(pids, pipes, strict=True):
        os.waitpid(pid, 0)
        os.close(end)       # or one that said nothing would be waited for
    return [os.read(start, 100_000).decode() for start, _ in pipes]


def test_the_dearest_parts_go_first_to_whom_has_least_to_do():
    assert ranks.shares([1.0, 5.0, 3.0, 2.0, 2.0], 2) == [[1, 4], [2, 3, 0]]
    assert ranks.shares([1.0] * 5, 3) == [[0, 3], [1, 4], [2]]
    assert ranks.shares([], 2) == [[], []]


def test_one_process_does_all_and_says_what_it_is_given():
    assert ranks.spread([1, 2], lambda part: (torch.tensor(part), None)) == [(torch.tensor(1), None), (2, None)]
    assert ranks.from_first(lambda: {"a": [None, 1.5]}) == {"a": [None, 1.5]}
    assert ranks.gathered(lambda: 3) == [3]


def test_all_know_the_whole_in_the_order_of_the_parts_whoever_did_them():
    def work(rank: int) -> str:
        mine: list[int] = []

        def one(part: int) -> tuple[torch.Tensor | None, ...]:
            mine.append(part)
            inner = ranks.spread([part], lambda p: (torch.tensor(p),))[0][0]      # within a share, it is done alone
            return torch.full((part,), float(rank)), None if part % 2 else torch.tensor(True), inner

        rows = ranks.spread(range(5), one, [1.0, 2.0, 3.0, 4.0, 50.0])
        total = ranks.summed(torch.tensor([float(rank + 1)], dtype=torch.float64)).item()
        first = ranks.from_first(lambda: rank)
        return repr((sorted(mine), [len(row[0]) for row in rows], [row[1] for row in rows],
                     [int(row[2]) for row in rows], total, first, ranks.gathered(lambda: rank)))

    first, second = as_several(2, work)
    shared = "[0, 1, 2, 3, 4], [tensor(True), None, tensor(True), None, tensor(True)], [0, 1, 2, 3, 4], 3.0, 0, [0, 1])"
    assert (first, second) == (f"([4], {shared}", f"([0, 1, 2, 3], {shared}")


def test_the_first_part_that_fails_is_what_all_fail_of():
    def one(part: int) -> tuple[()]:
        if part in (1, 2):
            raise (DivergedError if part == 1 else StorageError)(f"part {part}")
        return ()

    said = as_several(3, lambda rank: ranks.spread(range(4), one))
    assert said == ["DivergedError: part 1"] * 3


def test_a_bug_is_told_to_the_others_with_its_name():
    def work(rank: int) -> None:
        if rank == 1:
            raise LookupError("odd")
        ranks.gathered(lambda: None)

    heard, said = as_several(2, work)
    assert (heard, said) == ("PeerError: process 1 of 2 failed while starting: LookupError: odd", "LookupError: odd")


def test_a_process_that_computes_something_else_is_named():
    said = as_several(3, lambda rank: ranks.expect_equal("model", lambda: str(rank == 2)))
    assert all(text.startswith("PeerError: process 2 of 3 holds another model than process 0") for text in said)


def test_one_that_died_is_not_called_late():
    def work(rank: int) -> None:
        if rank == 2:
            os._exit(0)
        with ranks.phase("sampling"):
            ranks.gathered(lambda: None)

    first, second, _ = as_several(3, work)
    assert first.startswith("PeerError: process 2 of 3 ended while sampling; --resume goes on")
    assert "another process of this run ended while sampling" in second or "process 2 of 3 ended" in second


def test_an_error_says_whose_it_is_through_what_it_becomes():
    def fails(part: int) -> tuple[()]:
        if part == 1:
            raise StorageError("full")
        return ()

    def told(rank: int) -> str:
        try:
            with ranks.phase("updating"):
                ranks.spread([0, 1], fails)
        except StorageError as error:
            again = StorageError(f"step 3: {error}")
            again.__cause__ = error
            return repr((again.process, failed_process(again)))

    assert as_several(2, told) == ["('', 'process 1 of 2, while updating: ')"] * 2


def test_memory_that_ran_out_in_another_process_is_told_as_ones_own():
    def told(rank: int) -> str:
        def runs_out(part: int) -> tuple[()]:
            if part == 1:
                raise RuntimeError("can't allocate memory: you tried to allocate 4096 bytes")
            return ()

        try:
            with ranks.phase("sampling"), phase(SAMPLING, torch.device("cpu")):
                ranks.spread([0, 1], runs_out)
        except OutOfMemory as error:
            cause = error.__cause__
            return repr((str(error)[:60], failed_process(error) if rank == 0 else "", cause.__cause__ is not cause))

    start = "memory ran out while sampling responses and measuring them: 0.00 GB"[:60]
    assert as_several(2, told) == [
        repr((start, "process 1 of 2, while sampling: ", True)), repr((start, "", True))]


def test_one_that_comes_late_is_named_with_what_it_is_waited_for():
    def work(rank: int) -> None:
        ranks._here.timeout = 1.0
        with ranks.phase("sampling"):
            ranks.gathered(lambda: None if rank == 0 else __import__("time").sleep(3.0))

    first, _ = as_several(2, work)
    assert first.startswith("PeerError: process 1 of 2 did not come within 1 s (run.timeout_s) while sampling")


@pytest.mark.parametrize("value", [0.1, 1e-3, 7.0])
def test_float64_sums_of_float32_numbers_are_the_same_in_any_order(value):
    torch.manual_seed(0)
    numbers = (torch.randn(64) * value).double()
    sums = {numbers[torch.randperm(64)].cumsum(0)[-1].item() for _ in range(50)}
    assert len(sums) == 1
    assert PeerError.exit_code == 75
