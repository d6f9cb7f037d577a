"""The card of a finished model: reference, fingerprint, KL with its interval, budget, and the command for all of it."""

import json
import re
import shlex


def test_the_card_of_final_says_what_was_measured_and_its_command_measures_it_again(eval_kl, run_folder, llama):
    card = (run_folder / "final" / "README.md").read_text()
    info = json.loads((run_folder / "final" / "kltune.json").read_text())
    assert "PeftModel.from_pretrained" in card
    assert "## How far it is from its reference" in card
    for name in ("sha256", "tokenizer_sha256", "template_sha256"):
        assert info["reference"][name] in card
    assert f"reference: {llama}, float32" in card
    assert "budget: target 2 nats per response" in card
    line = re.search(r"```\n(kltune eval-kl .*?) +# the same responses", card)[1]
    words = [str(run_folder / "final") if word == "this/folder" else word for word in shlex.split(line)[2:]]
    code, document, _ = eval_kl(*words)
    assert code == 0
    kl = document["kl"]["exact"]
    assert abs(kl["nats_per_response"] - info["kl"]["nats_per_response"]) < 1e-6
    assert f"on {info['kl']['responses']} responses" in card
