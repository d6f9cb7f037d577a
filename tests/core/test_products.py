"""A product with frozen weights is the one that torch makes, whichever library makes it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from kltune.core.products import MOST_ROWS, ONEDNN, linear_of, product


class RowsByOneDNN(TorchDispatchMode):
    """Notes how many rows each product by oneDNN within has."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "mkldnn::_linear_pointwise":
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not ONEDNN, reason="torch has no oneDNN here")
@pytest.mark.parametrize(("shape", "filled"), [((16,), 16), ((3, 11), 48), ((MOST_ROWS,), MOST_ROWS)])
@pytest.mark.parametrize("biased", [False, True])
def test_few_rows_are_filled_up_and_the_numbers_are_those_of_the_plain_product(shape, filled, biased):
    torch.manual_seed(0)
    weight, bias, x = torch.randn(1030, 256) / 16, torch.randn(1030) if biased else None, torch.randn(*shape, 256)
    for rows, by in ((x, weight), (torch.randn(*shape, 1030) / 32, weight.t())):
        added = bias if by is weight else None
        with RowsByOneDNN() as asked:
            found = product(rows, by, added)
        exact = linear(rows.double(), by.double(), None if added is None else added.double())
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        assert asked.rows == [filled]


def test_what_is_small_trained_long_or_of_another_type_is_left_to_torch():
    x, weight = torch.randn(16, 512), torch.randn(512, 512)
    left = [
        (x[:, :64], weight[:, :64]), (x.double(), weight.double()), (x.bfloat16(), weight.bfloat16()),
        (x[:8], weight), (x[:0], weight), (torch.randn(MOST_ROWS + 1, 512), weight),
        (x, nn.Parameter(weight)), (x.clone().requires_grad_(True), weight),
    ]
    for inputs, by in left:
        with RowsByOneDNN() as asked:
            assert torch.equal(product(inputs, by), linear(inputs, by))
        assert asked.rows == []


def test_a_layer_is_called_directly_only_where_it_is_nothing_but_a_product():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, scaled, x = nn.Linear(4, 3), Scaled(4, 3), torch.randn(2, 4)
    assert torch.equal(linear_of(plain)(x), plain(x))
    assert linear_of(plain) is not plain
    assert linear_of(scaled) is scaled
