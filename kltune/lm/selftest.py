"""What must hold before step 1 and after the last, tried out on the real model rather than assumed."""

from collections.abc import Sequence

import torch

from kltune.errors import ModelError
from kltune.lm.batches import pad_right
from kltune.lm.data import Prompt
from kltune.lm.policy import Policy

PROMPTS, TOKENS = 8, 64  # of each as many: over a large vocabulary, all of long prompts would take longer than a step


@torch.no_grad()
def check_fresh_policy(policy: Policy, prompts: Sequence[Prompt]) -> None:
    """Policy and reference are one before training: exact KL 0 on a few prompts, and two passes agree bit for bit.

    Raises:
        ModelError: they are not, with the likely causes in order.
    """
    rows = [prompt.ids[:TOKENS] for prompt in prompts[:PROMPTS] if len(prompt.ids) > 1] or [prompts[0].ids * 2]
    ids = pad_right(rows, policy.tokenizer.pad_token_id).to(policy.device)
    scored = pad_right([[False] + [True] * (len(row) - 1) for row in rows], False, torch.bool).to(policy.device)
    once, again = policy.measure(ids, scored), policy.measure(ids, scored, exact=False)
    if not torch.equal(once.logprobs, again.logprobs):
        raise ModelError(
            f"{policy.fingerprint.path}: two passes over the same tokens differ, so something in the model draws "
            "random numbers; every KL would be noise. Dropout is off here: look for custom code in the model."
        )
    worst = once.ref_kl.max().item()
    if worst != 0.0:
        raise ModelError(
            f"{policy.fingerprint.path}: before training, KL(policy ‖ reference) is {worst:.3g} nats at a token and "
            "not 0, so adapter-off is not the policy's own start. Likely: an adapter that is not fresh, or a layer "
            "that the adapter changes even at 0."
        )


def check_frozen(policy: Policy) -> None:
    """The reference's weights are the ones that were fingerprinted, to the last bit.

    Raises:
        ModelError: something moved them, and every KL measured since is against another reference.
    """
    now = policy.frozen_sha256()
    if now != policy.fingerprint.sha256:
        raise ModelError(
            f"The frozen weights changed during the run: sha256 {policy.fingerprint.sha256[:12]} at the start, "
            f"{now[:12]} now. Nothing measured in this run can be trusted."
        )
