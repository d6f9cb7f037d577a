"""Signs of life, and numbers, durations and errors as people write them."""

import queue
import time

import pytest

from kltune.run.screen import common_places, counted, doing, duration, interval, number, signs_of_life, with_error


def test_who_waits_is_told_what_is_done_and_how_far_it_is_and_nobody_else():
    lines, heard = queue.Queue(), [0.0]

    def next_of(what: str) -> str:
        return next(line for line in iter(lambda: lines.get(timeout=60), None) if what in line)

    with signs_of_life(lines.put, lambda: heard[0], silence=0.02):
        assert next_of("loading") == "loading the libraries, 0 s so far\n"
        doing("step 3 of 40")
        assert next_of("step") == "step 3 of 40, 0 s so far\n"
        counted("sampling", 512)(256)
        assert next_of("256") == "sampling: 256 of 512 responses, 0 s so far\n"
        heard[0] = time.monotonic() + 3600.0        # something else is printed all the time
        with pytest.raises(queue.Empty):        # one may have been on its way
            [lines.get(timeout=0.2) for _ in range(2)]



def test_numbers_and_durations_as_people_write_them():
    shown = [number(value) for value in (None, float("nan"), 5.934, 12, 12345, 123456.7, 0.000123)]
    assert shown == ["–", "–", "5.93", "12", "12,345", "123,457", "0.000123"]
    assert [duration(seconds) for seconds in (0.5, 59.4, 200, 7500)] == ["0.5 s", "59.4 s", "3 min 20 s", "2 h 5 min"]


def test_numbers_with_errors_have_as_many_digits_as_their_errors_allow():
    pairs = [(3.468, 0.1226), (1.918, 0.0948), (0.2, 0.008), (1234.5, 33.0), (-0.0898, 0.067), (1.0, None), (0.0, 0.0)]
    assert [with_error(*pair) for pair in pairs] == [
        "3.47 ± 0.12", "1.92 ± 0.09", "0.200 ± 0.008", "1,234 ± 33", "−0.09 ± 0.07", "1", "0 ± 0",
    ]
    assert [interval(bounds) for bounds in ((5.712, 6.154), (-0.5, None), (None, None), None)] == [
        "5.71 to 6.15", "−0.5 to any", "–", "–",
    ]


def test_a_column_gets_the_places_of_its_most_exact_number_but_no_long_ones():
    columns = {
        "92.4 ± 1.8": [(92.39, 1.8), (3.74, 0.2)], "0.0185 ± 0.0014": [(0.0185, 0.0014), (5.24, 0.36)],
        "no errors": [(0.295, None), (0.52, None)], "one without": [(4.84, 0.05), (47.812, None)],
        "integers": [(30, None)], "tiny": [(1.2e-4, 2e-6)], "none": [(None, None)],
    }
    assert {name: common_places(pairs) for name, pairs in columns.items()} == {
        "92.4 ± 1.8": 2, "0.0185 ± 0.0014": 3, "no errors": 3, "one without": 2, "integers": 0, "tiny": 6, "none": 0,
    }
    shown = number(-0.5, 2), with_error(92.39, 1.8, 2), interval((1.0, None), 1), interval((88.71, 96.02))
    assert shown == ("−0.50", "92.39 ± 1.80", "1.0 to any", "88.7 to 96.0")
