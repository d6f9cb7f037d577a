"""Signs of life, and numbers, durations and errors as people write them."""

import queue
import time

import pytest

from kltune.run.screen import (
    apart,
    common_places,
    counted,
    doing,
    duration,
    interval,
    number,
    out_of,
    percent,
    signs_of_life,
    with_error,
)


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


def test_a_thousand_after_rounding_is_written_as_one_and_no_zero_has_a_sign():
    assert [number(value) for value in (999.7, -999.7, 999.4, 1000, -0.0)] == ["1,000", "−1,000", "999", "1,000", "0"]
    assert [number(-0.001, 2), with_error(-0.001, 0.3)] == ["0.00", "0.0 ± 0.3"]


def test_an_error_that_is_not_0_is_never_written_as_0():
    assert [with_error(1e-8, 1e-9), with_error(3.0, 1e-8), with_error(92.39, 1e-4, 2)] == [
        "1e-08 ± 1e-09", "3 ± 1e-08", "92.39000 ± 0.00010",
    ]


def test_an_interval_has_the_places_of_its_width_and_of_what_it_is_held_against():
    assert [interval(bounds) for bounds in ((4.996, 5.004), (999.7, 1001.2), (0.0, 1e-8), (5.0, 5.0))] == [
        "4.996 to 5.004", "999.7 to 1,001.2", "0 to 1e-08", "5 to 5",
    ]
    assert interval((4.706, 5.004)) == "4.71 to 5.00"
    assert interval((4.706, 5.004), against=(5.0, None)) == "4.706 to 5.004"
    assert interval((4.9996, 5.0004), 1) == "4.9996 to 5.0004"      # whatever its column has


def test_numbers_that_differ_are_told_apart_and_rounding_of_binary_fractions_is_none():
    assert apart(5.004, 5) == ["5.004", "5"]
    assert apart(2.0001, 2.0002, places=3) == ["2.0001", "2.0002"]
    assert apart(7.5, None, 6.9, 6.8999999999999995) == ["7.5", "–", "6.9", "6.9"]


def test_a_share_below_all_is_never_100_percent_and_one_above_none_never_0():
    assert [percent(share) for share in (0.95, 0.999, 0.9999, 0.99951, 0.07, 0.0, 1.0)] == [
        "95", "99.9", "99.99", "99.951", "7", "0", "100",
    ]
    assert [percent(share, 0) for share in (0.996, 0.004, 0.5, 0.0, 1.0)] == ["99.6", "0.4", "50", "0", "100"]
    assert percent(0.99996, digits=3) == "99.996"


def test_a_step_beyond_the_planned_ones_is_of_no_number():
    assert [out_of(3, 4), out_of(4, 4), out_of(8, 4), out_of(3, None), out_of(3, 4, "/")] == [
        " of 4", " of 4", "", "", "/4",
    ]
