"""A product with frozen weights is the one that torch makes, whichever library makes it."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from kltune.core import products
from kltune.core.products import MOST_ROWS, ONEDNN, linear_of, product, widen, with_update


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


def test_what_is_small_trained_long_or_of_another_type_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(products, "WIDENED", set())
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


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def narrow(request, monkeypatch):
    """A dtype that is widened here, whatever this processor multiplies; pieces so small that there are several."""
    monkeypatch.setattr(products, "WIDENED", {request.param})
    monkeypatch.setattr(products, "PIECE", 64 * 40)
    return request.param


@pytest.mark.parametrize(("out", "inside"), [(300, 40), (40, 300), (24, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_widened_product_is_rounded_once(narrow, out, inside, biased):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 7, inside).to(narrow), torch.randn(out, inside).to(narrow), None
    if biased:
        bias = torch.randn(out).to(narrow)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    found = product(x, weight, bias)
    assert (found.dtype, found.shape) == (narrow, (3, 7, out))
    off = (found.double() - exact).abs()
    assert (off <= torch.finfo(narrow).eps / 2 * exact.abs() + 1e-4).all()
    by_transposed = product(found, weight.t())
    torch.testing.assert_close(by_transposed.double(), found.double() @ weight.double(), rtol=1e-2, atol=1e-3)


def test_a_widened_update_is_rounded_once_where_it_is_added(narrow):
    torch.manual_seed(0)
    out, x, a, b = (torch.randn(*shape).to(narrow) for shape in ((3, 5, 30), (3, 5, 8), (4, 8), (30, 4)))
    inner = product(x, a)
    exact = out.double() + 0.7 * inner.double() @ b.double().t()
    off = (with_update(out, x, a, b, 0.7).double() - exact).abs()
    assert (off <= torch.finfo(narrow).eps / 2 * exact.abs() + 1e-6).all()


def test_gradients_of_widened_products_are_those_of_the_sum(narrow):
    """Of input, matrices and what is added to, once and twice, and forwards: held against float64."""
    torch.manual_seed(0)
    given = [torch.randn(*shape).to(narrow) for shape in ((5, 30), (5, 8), (4, 8), (30, 4))]
    along = torch.randn(5, 30).to(narrow)

    def found(out, x, a, b):
        return with_update(out, x, a, b, 0.5) + product(x, b[:8].t()).sum()

    def exact(out, x, a, b):
        return out + 0.5 * x @ a.t() @ b.t() + (x @ b[:8]).sum()

    for kind in (lambda f, point, v: torch.func.vjp(f, *point)[1](v),
                 lambda f, point, v: torch.func.jvp(f, tuple(point), tuple(point))[1:],
                 second_derivatives):
        ours = kind(found, given, along)
        right = kind(exact, [tensor.double() for tensor in given], along.double())
        for one, other in zip(ours, right, strict=True):
            assert one.dtype == narrow
            assert (one.double() - other).norm() < 0.02 * other.norm()


def test_a_widened_product_may_be_added_to_in_place(narrow):
    x, weight = torch.randn(2, 3, 8).to(narrow).requires_grad_(), torch.randn(4, 8).to(narrow)
    out = product(x, weight)
    out.add_(1.0)
    found, = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(found, weight.sum(0).expand_as(x), rtol=2e-2, atol=1e-2)


def second_derivatives(function, point, along):
    """How Jᵀw moves with w, as the curvature of a policy is read."""
    point = [tensor.detach().requires_grad_(True) for tensor in point]
    w = torch.zeros_like(along, requires_grad=True)
    pulled = torch.autograd.grad(function(*point), point, w, create_graph=True)
    return torch.autograd.grad(pulled, w, [tensor.detach() for tensor in point])


def test_the_linear_layers_of_a_narrow_model_are_widened_where_they_are_called(narrow):
    model = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Linear(30, 4)).to(narrow)
    x, plain = torch.randn(5, 8).to(narrow), copy.deepcopy(model)
    widen(model)
    called, expected = [], plain(x)
    with Noting(called):
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=2e-2, atol=1e-2)
    assert called == [torch.float32] * 2


class Noting(TorchDispatchMode):
    """Notes in which type matrices are multiplied within."""

    def __init__(self, called: list[torch.dtype]):
        super().__init__()
        self.called = called

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            self.called.append(args[-1].dtype)
        return func(*args, **(kwargs or {}))
