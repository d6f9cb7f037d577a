"""A product with frozen weights is the one that torch makes, whichever library makes it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from kltune.core import products
from kltune.core.products import FrozenLinear, linear_of, product


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """How many weights each product by oneDNN had."""
    counts, by_onednn = [], products._by_onednn

    def counted(x, weight, bias):
        counts.append(weight.numel())
        return by_onednn(x, weight, bias)

    monkeypatch.setattr(products, "_by_onednn", counted)
    return counts


@pytest.mark.skipif(not products.ONEDNN, reason="torch has no oneDNN here")
@pytest.mark.parametrize("shape", [(0, 256), (1, 256), (3, 5, 256)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_two_derivatives_are_those_of_the_plain_product(asked, shape, biased):
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 256) / 16, torch.randn(300) if biased else None
    x = torch.randn(shape, requires_grad=True)

    def all_of(multiply, *tensors: torch.Tensor) -> list[torch.Tensor]:
        x, weight, *bias = tensors
        out = multiply(x, weight, *bias)
        (first,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return [out, first, *torch.autograd.grad(first.square().sum(), x)]

    tensors = [x, weight, *([] if bias is None else [bias])]
    wanted = all_of(linear, *(tensor.detach().double().requires_grad_(tensor is x) for tensor in tensors))
    for found, exact in zip(all_of(product, *tensors), wanted, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    assert set(asked) == {300 * 256}
    with torch.no_grad():
        torch.testing.assert_close(product(x, weight, bias), linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_what_is_small_trained_or_of_another_type_is_left_to_torch(asked):
    x, large = torch.randn(2, 256), torch.randn(300, 256)
    for inputs, weight in [
        (x, large[:10]), (x.double(), large.double()), (x.bfloat16(), large.bfloat16()), (x, nn.Parameter(large)),
    ]:
        assert torch.equal(product(inputs, weight), linear(inputs, weight))
    trained = nn.Parameter(torch.zeros(300, 256))
    product(x, trained).sum().backward()
    assert torch.equal(trained.grad, x.sum(0).expand(300, 256))
    assert not asked


def test_a_layer_is_called_directly_only_where_it_is_nothing_but_a_product():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, frozen, scaled = (kind(4, 3) for kind in (nn.Linear, FrozenLinear, Scaled))
    x = torch.randn(2, 4)
    for layer in (plain, frozen, scaled):
        assert torch.equal(linear_of(layer)(x), layer(x))
    assert linear_of(scaled) is scaled
