"""Dial an adapter back: α times what it does, from the reference (0) to itself (1), in its own tensors.

The result is an adapter like any other, its scale baked in, so every loader gets it right.
"""

import torch

from kltune.errors import ModelError
from kltune.lm.policy import Policy

# By the kind of tensor: what α acts on, and what is left as it is. Of A and B, that is the one which starts at 0: in
# PEFT it is B in linear layers and A in embeddings.
SCALED = {"lora_B", "lora_embedding_A", "lora_magnitude_vector", "ia3_l"}
LEFT = {"lora_A", "lora_embedding_B"}


class AdapterScale:
    """A policy whose adapter can be set to any share of what it was.

        W_α = W + α s B A       LoRA, rsLoRA: exact
        m_α = (1 − α) ‖W‖ + α m with the same B_α      DoRA: the magnitudes go along a straight line too
        l_α = 1 + α (l − 1)     IA3

    Source: MATH 4.7.
    """

    def __init__(self, policy: Policy):
        """Remember the adapter as it is: that is α = 1.

        Raises:
            ModelError: there are two sets of weights, or the adapter has tensors of a kind that has no scale.
        """
        if policy.full:
            raise ModelError(
                f"{policy.fingerprint.path}: only an adapter that leaves its base alone can be dialled back; this "
                "checkpoint has weights of its own."
            )
        tensors = policy.trainable_parameters()
        roles = {name: name.split(".")[1] for name in tensors}
        if strange := sorted(set(roles.values()) - SCALED - LEFT):
            raise ModelError(f"an adapter with {', '.join(strange)} has no scale; LoRA, rsLoRA, DoRA and IA3 have one.")
        self._tensors = {name: tensor for name, tensor in tensors.items() if roles[name] in SCALED}
        self._on = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self._off = {name: policy.untrained[name].to(tensor.device) for name, tensor in self._tensors.items()}

    @torch.no_grad()
    def set(self, alpha: float) -> None:
        """Make the adapter α times what it was; 0 and 1 are exact."""
        for name, tensor in self._tensors.items():
            on, off = self._on[name], self._off[name]
            tensor.copy_(on if alpha == 1.0 else off if alpha == 0.0 else off + alpha * (on - off))
