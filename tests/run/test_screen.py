"""Numbers, durations and errors as people write them."""

from kltune.run.screen import duration, interval, number, with_error


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
