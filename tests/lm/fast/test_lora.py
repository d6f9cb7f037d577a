"""The faster LoRA layer is PEFT's: in what it gives, what it passes back, and what it leaves to PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from kltune.core import products
from kltune.lm.fast.lora import LoraLinear, speed_up
from kltune.lm.fast.memory import saved_bytes
from kltune.lm.model.adapters.weights import AdapterSwitch
from tests.counting import Counted
from tests.tiny_policies import randomize


class Net(nn.Module):
    """One linear layer that can be adapted."""

    def __init__(self, inside: int, out: int, bias: bool):
        super().__init__()
        self.up = nn.Linear(inside, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.up(x)


def adapted(inside: int, out: int, *, bias: bool = False, **config) -> tuple[nn.Module, Linear]:
    """A model and its one PEFT layer, with an adapter that does something."""
    torch.manual_seed(inside + out)
    model = get_peft_model(Net(inside, out, bias), LoraConfig(r=4, lora_alpha=6, target_modules=["up"], **config))
    layer = model.base_model.model.up
    for name, tensor in layer.named_parameters():
        if "lora_" in name:
            tensor.data.normal_(std=0.3)
    return model.double(), layer


def outcome(model: nn.Module, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """What the layer gives, and the gradients of a loss of it."""
    x = x.clone().requires_grad_(True)
    y = model(x)
    (y.square() * torch.linspace(0.5, 2.0, y.shape[-1])).sum().backward()
    found = [y.detach(), x.grad, *(t.grad for t in layer.parameters() if t.requires_grad)]
    model.zero_grad()
    return found


@pytest.mark.parametrize("shape", [(3, 5), (40, 30), (1, 1), (7,)], ids=["few", "many", "one", "flat"])
@pytest.mark.parametrize(("inside", "out"), [(8, 12), (64, 96)], ids=["small", "wide"])  # one adds first, one never
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_peft_gives_and_passes_back_what_peft_passes_back(shape, inside, out, bias):
    model, layer = adapted(inside, out, bias=bias)
    x = torch.randn(*shape, inside, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = outcome(model, layer, x)
    before = layer.base_layer.weight.clone()
    speed_up(model)
    assert type(layer) is LoraLinear
    for mine, theirs in zip(outcome(model, layer, x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)
    assert torch.equal(layer.base_layer.weight, before)


def test_switched_off_it_is_the_base_and_an_adapter_of_zeros_is_nothing_to_the_bit():
    model, layer = adapted(8, 12)
    speed_up(model)
    switch, x = AdapterSwitch(model), torch.randn(50, 8, dtype=torch.float64)
    with switch.active(None):
        assert torch.equal(model(x), layer.base_layer(x))
    with switch.active("of another layer"):
        assert torch.equal(model(x), layer.base_layer(x))
    assert not torch.equal(model(x), layer.base_layer(x))
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(model(x), layer.base_layer(x))


@pytest.mark.parametrize(
    "config", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True}, {"use_rslora": True}]
)
def test_other_kinds_of_lora_are_left_to_peft(config):
    model, layer = adapted(8, 12, bias=True, **config)
    x = torch.randn(50, 8, dtype=torch.float64)
    found = []
    for quick in (False, True):
        if quick:
            speed_up(model)
        torch.manual_seed(1)
        found.append(outcome(model, layer, x))
    for mine, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_two_adapters_at_once_and_merged_ones_are_left_to_peft():
    model, layer = adapted(8, 12)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"]))
    model.double()
    layer.lora_B["second"].weight.data.normal_()
    x = torch.randn(50, 8, dtype=torch.float64)
    layer._active_adapter = ["default", "second"]
    both = model(x)
    speed_up(model)
    assert torch.equal(model(x), both)
    layer._active_adapter = ["default"]
    layer.merge()
    assert torch.equal(model(x), layer.base_layer(x))


def test_in_bfloat16_the_update_is_not_added_to_the_weight_first():
    model, layer = adapted(8, 12)
    speed_up(model.bfloat16())
    layer.base_layer.weight.data.fill_(256.0)  # the next number there is 258: an update of 0.375 would be lost
    layer.lora_A["default"].weight.data.copy_(torch.tensor([0.25, 0.0] * 4))
    layer.lora_B["default"].weight.data.fill_(0.25)
    x = torch.tensor([1.0, -1.0] * 4, dtype=torch.bfloat16).repeat(200, 1)
    assert (model(x) == 1.5).all()


# --- beside a base in bfloat16 ----------------------------------------------------------------------------------------


def narrow(**config) -> tuple[nn.Module, Linear]:
    """A base in bfloat16 with its adapter in float32, as PEFT leaves it."""
    model, layer = adapted(64, 96, **config)
    model.bfloat16()
    for name, tensor in layer.named_parameters():
        if "lora_" in name:
            tensor.data = tensor.data.float()
    return model, layer


def test_beside_a_narrow_base_nothing_of_a_position_is_cast_and_less_is_kept(monkeypatch):
    monkeypatch.setattr(products, "WIDENED", set())     # as a processor does that multiplies bfloat16
    x = torch.randn(2, 200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    counted, kept, found = {}, {}, {}
    for kind in ("peft", "ours"):
        model, layer = narrow()
        if kind == "ours":
            speed_up(model)
        with Counted() as counted[kind], torch.no_grad():
            model(x)
        own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), x)}
        kept[kind] = saved_bytes(lambda model=model: model(x), own)
        found[kind] = outcome(model, layer, x)
        assert all(tensor.grad is None and tensor.dtype == torch.float32 for tensor in layer.lora_A.parameters())
    assert counted["ours"].bytes < 0.5 * counted["peft"].bytes
    assert counted["ours"].kernels < counted["peft"].kernels
    assert kept["ours"] < 0.4 * kept["peft"]
    exact, _ = adapted(64, 96)
    wanted = exact.float()(x.float())
    ours, theirs = ((found[kind][0].float() - wanted).abs().mean() for kind in ("ours", "peft"))
    assert ours < 1.5 * theirs      # what rounding costs
    for mine, other in zip(found["ours"][1:], found["peft"][1:], strict=True):
        assert (mine - other).float().norm() < 0.02 * other.float().norm()


def test_while_a_policy_samples_its_adapter_is_cast_once(open_policy):
    policy = open_policy(dtype="bfloat16")
    randomize(policy.trainable_parameters())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = policy.network.hidden(ids)
        with policy.network.merged(), Counted() as within:
            assert torch.equal(policy.network.hidden(ids), plain)
        with Counted() as without:
            policy.network.hidden(ids)
        layers = sum(type(module) is LoraLinear for module in policy.network.causal.modules())
        assert without.casts - within.casts == 2 * layers
        randomize(policy.trainable_parameters(), seed=5)        # written through .data, as an undone step is
        assert not torch.equal(policy.network.hidden(ids), plain)
