"""Small heads that read the trunk's hidden states; always float32."""

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """One number read off a hidden state: what is expected of the rest of a response, or the score of all of it.

    Starts at exactly 0 (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"), so that the first
    advantages are the rewards themselves and not the noise of a random head, and the first pairs are all undecided.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, H] hidden states -> [N] numbers."""
        return self.linear(hidden.float()).squeeze(-1)
