"""What people read: every number with its error, marks or colours by KL, verdicts in words."""

from kltune.report.text import _bars, _token, compare_text, eval_kl_lines, eval_kl_text, verdict_line


def gate(verdict: str, **more) -> dict:
    return {
        "max_kl": 4.0, "unit": "nats_per_token", "confidence": 0.95, "verdict": verdict, "more_responses": None,
        "wants_prompts": False, "planned_looks": 1, "looks": [{"responses": 100, "confidence": 0.95}],
    } | more  # fmt: skip


def test_verdicts_say_what_to_do():
    assert verdict_line(gate("pass")) == "PASS: within 4 nats per token at 95% confidence"
    assert verdict_line(gate("fail")).startswith("FAIL: over 4 nats per token")
    assert "about 70 more responses" in verdict_line(gate("inconclusive", more_responses=70))
    assert "more prompts" in verdict_line(gate("inconclusive", wants_prompts=True))
    looked = gate("pass", planned_looks=5, looks=[{"responses": n, "confidence": 0.99} for n in (256, 512)])
    assert "look 2 of at most 5, 512 responses; each interval at 99 %" in verdict_line(looked)


def test_tokens_are_marked_without_colour_and_coloured_with():
    assert _token(" very", 1.26, False) == " very[1.3]"
    assert _token(" the", 0.29, False) == " the"
    assert _token(" very", 1.26, True) == "\033[1;31m very\033[0m"
    assert _token(" very", 0.1, True) == "\033[33m very\033[0m"
    assert _token(" the", 0.01, True) == " the"


def test_a_response_cannot_steer_the_terminal():
    assert _token("\033[2J\n", 0.0, False) == "\\x1b[2J⏎"


def test_bars_are_as_high_as_the_means_and_weigh_positions_by_responses():
    rows = [{"nats": n, "responses": 1} for n in (0.0, 0.5, 1.0)]
    assert _bars(rows) == ("▁▅█", 1.0)
    many = [{"nats": 1.0, "responses": 3}, {"nats": 0.0, "responses": 1}] * 60
    assert _bars(many) == ("█" * 60, 0.75)


ZERO = {"nats_per_response": 0.0, "stderr": 0.0, "ci": [0.0, 0.0], "nats_per_token": 0.0, "token_stderr": 0.0}
EQUAL = {
    "direction": "KL(policy||reference)", "checkpoint": "runs/a", "responses": 4, "prompts": 2, "temperature": 1.0,
    "max_new_tokens": 8, "kl": {"exact": ZERO}, "forward": None, "deployed": None, "confidence": 0.95,
    "noise_floor": {"nats_per_response": 1e-8, "nats_per_token": 1e-9}, "reference": {"dtype": "bfloat16"},
    "agreement_z": 0.0, "truncated_fraction": 0.5, "entropy": {"policy": 1.0, "reference": 1.0}, "tv": 0.0,
    "tv_stderr": 0.0, "js": None, "alignment_tax": None, "gate": None,
    "distribution": {"quantiles": {"0.5": 0.0, "0.9": 0.0, "0.99": 0.0}, "maximum": 0.0, "largest_share": 0.0,
             "heavy": False},
}


def test_a_checkpoint_that_equals_its_reference_says_so_and_nothing_of_where():
    text = eval_kl_text(EQUAL)
    assert "equals its reference" in text
    assert "by position" not in text


def test_what_rounding_makes_of_the_kl_is_said_in_a_narrow_dtype():
    floor = {"nats_per_response": 0.1412, "nats_per_token": 0.00055}
    assert "rounding alone (bfloat16) makes 0.14 nats per response, 0.00055 per token" in eval_kl_text(
        EQUAL | {"noise_floor": floor}
    )
    assert "rounding" not in eval_kl_text(EQUAL)


def test_the_verdict_comes_first_and_may_come_alone():
    measured = EQUAL | {"gate": gate("pass")}
    assert eval_kl_text(measured).startswith("PASS: within 4 nats per token at 95% confidence\nKL(policy||reference)")
    assert eval_kl_lines(measured) == (
        "runs/a: PASS: within 4 nats per token at 95% confidence; KL 0 ± 0 nats per response"
    )
    several = {"checkpoints": [EQUAL, EQUAL | {"checkpoint": "runs/b", "warnings": ["odd"]}]}
    assert eval_kl_lines(several) == (
        "runs/a: KL 0 ± 0 nats per response\nruns/b: KL 0 ± 0 nats per response; warning: odd"
    )


def test_no_confidence_below_1_is_printed_as_100_percent():
    assert verdict_line(gate("pass", confidence=0.999)) == "PASS: within 4 nats per token at 99.9% confidence"
    looks = gate("pass", planned_looks=5, confidence=0.9996, looks=[{"responses": 9, "confidence": 0.99992}])
    assert "at 99.96% confidence (look 1 of at most 5, 9 responses; each interval at 99.99 %)" in verdict_line(looks)
    sides = {side: {"checkpoint": side, "tokens": 9.0} for side in ("first", "second")}
    compared = {
        **sides, "ci": (0.99951, 0.99999),
        "win_rate": 0.99984, "confidence": 0.999, "wins": 3999, "ties": 0, "losses": 1, "prompts": 4000, "judge": "j",
    }
    assert "99.98 % (99.9%: 99.951 to 99.999), a tie" in compare_text(compared)
