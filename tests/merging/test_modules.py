import copy
import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_lowrank import MergeError, merge_modules
from tests.conftest import make_classifier, make_loader, make_trainer, mlp


def state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def random_net(seed, width=5, bias=True, convolution=False):
    torch.manual_seed(seed)
    first = [nn.Conv1d(1, width, 3, bias=bias), nn.Flatten()] if convolution else [nn.Linear(6, 4 * width, bias=bias)]
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(4 * width, 3, bias=bias))


@given(
    seed=st.integers(0, 1000),
    width=st.integers(1, 6),
    bias=st.booleans(),
    convolution=st.booleans(),
    coefficients=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    with_base=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_every_tensor_is_the_float64_combination(seed, width, bias, convolution, coefficients, with_base):
    nets = [random_net(seed + k, width, bias, convolution) for k in range(4)]
    *models, base = nets
    merged = merge_modules(*models, base=base if with_base else None, coefficients=coefficients)
    for name, value in merged.state_dict().items():
        tensors = [net.state_dict()[name].double() for net in models]
        start = base.state_dict()[name].double() if with_base else torch.zeros_like(tensors[0])
        expected = start + sum(c * (tensor - start) for c, tensor in zip(coefficients, tensors, strict=True))
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-7)


@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_algebra_of_the_sum(seed):
    one, two = random_net(seed), random_net(seed + 1)
    zero = copy.deepcopy(one)
    for parameter in zero.parameters():
        nn.init.zeros_(parameter)
    for left, right in (
        (merge_modules(one, two), merge_modules(two, one)),
        (merge_modules(one, zero), one),
        (merge_modules(one, one, base=one), one),
        (merge_modules(one, two, base=zero), merge_modules(one, two)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(state(left).values(), state(right).values(), strict=True))


def test_the_result_is_a_new_lightning_module_of_the_first_class_and_the_inputs_stay(namespace):
    one, two = (make_classifier(mlp(seed=seed), namespace) for seed in (0, 1))
    make_trainer(namespace).fit(one, make_loader())
    before = [state(module) for module in (one, two)]
    trainer = one.trainer
    merged = merge_modules(one, two)
    assert type(merged) is type(one)
    assert merged._trainer is None
    assert one.trainer is trainer
    for module, kept in zip((one, two), before, strict=True):
        assert all(torch.equal(kept[name], tensor) for name, tensor in module.state_dict().items())
    with torch.no_grad():
        merged.net[0].weight.fill_(0)
    assert one.net[0].weight.abs().sum() > 0
    make_trainer(namespace).fit(merged, make_loader())


class Everything(nn.Module):
    """One tensor of every kind, with known values."""

    def __init__(self, value, count=3):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.layer_norm = nn.LayerNorm(2)
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.register_buffer("table", torch.full((2,), 5.0))
        self.register_buffer("scratch", torch.full((2,), value), persistent=False)
        self.accuracy = MulticlassAccuracy(num_classes=3)
        for parameter in (*self.linear.parameters(), *self.norm.parameters(), *self.layer_norm.parameters()):
            nn.init.constant_(parameter, value)
        self.norm.running_mean.fill_(value)
        self.norm.running_var.fill_(value)
        self.norm.num_batches_tracked.fill_(count)


def test_default_rules_by_kind():
    one, two = Everything(1.0, count=3), Everything(3.0, count=8)
    one.accuracy.update(torch.tensor([0]), torch.tensor([0]))
    merged = merge_modules(one, two)
    found = {name: tensor.unique().tolist() for name, tensor in merged.state_dict().items()}
    assert found == {
        "frozen": [7.0],
        "table": [5.0],
        "linear.weight": [4.0],
        "linear.bias": [4.0],
        "norm.weight": [2.0],
        "norm.bias": [2.0],
        "norm.running_mean": [2.0],
        "norm.running_var": [2.0],
        "norm.num_batches_tracked": [3],
        "layer_norm.weight": [2.0],
        "layer_norm.bias": [2.0],
    }
    assert merged.scratch.tolist() == [1.0, 1.0]
    assert merged.accuracy.update_count == 0
    assert one.accuracy.update_count == 1


def test_base_and_coefficients_leave_the_other_rules_alone():
    merged = merge_modules(Everything(1.0), Everything(3.0), base=Everything(0.5), coefficients=[2.0, 1.0])
    assert merged.linear.weight.unique().item() == 0.5 + 2 * 0.5 + 2.5
    assert merged.norm.weight.unique().item() == 2.0
    assert merged.frozen.unique().item() == 7.0


def tied(value):
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    net[2].weight = net[0].weight
    nn.init.constant_(net[0].weight, value)
    return net


def test_tied_weights_are_summed_once_and_stay_tied():
    merged = merge_modules(tied(1.0), tied(2.0))
    assert merged[2].weight is merged[0].weight
    assert merged[0].weight.unique().tolist() == [3.0]


def test_sums_are_rounded_once():
    one, two, three = (nn.Linear(1, 1, bias=False) for _ in range(3))
    # In float32 the small number would be lost: (2^24 + 1) - 2^24 = 0 when accumulated there.
    for net, value in zip((one, two, three), (2.0**24, 1.0, -(2.0**24)), strict=True):
        nn.init.constant_(net.weight, value)
    assert merge_modules(one, two, three).weight.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_types_are_kept_and_results_equal_the_float64_sum_rounded_once(dtype):
    nets = [random_net(seed).to(dtype) for seed in range(5)]
    merged = merge_modules(*nets)
    for name, value in merged.state_dict().items():
        assert value.dtype is dtype
        assert torch.equal(value, sum(net.state_dict()[name].double() for net in nets).to(dtype))


def linear(value, dtype=torch.float32):
    net = nn.Linear(2, 2).to(dtype)
    nn.init.constant_(net.weight, value)
    return net


def test_overflow_and_non_finite_entries_name_the_tensor():
    with pytest.raises(MergeError, match=r"weight: the sum overflows torch.float16 \(largest magnitude 8e\+04\)"):
        merge_modules(linear(40000, torch.float16), linear(39968, torch.float16))
    with pytest.raises(MergeError, match="weight: has entries that are not finite in model 2"):
        merge_modules(linear(1), linear(float("nan")))
    with pytest.raises(MergeError, match="weight: has entries that are not finite in base"):
        merge_modules(linear(1), linear(1), base=linear(float("inf")))


def test_frozen_parameters_must_be_equal():
    one, two = Everything(1.0), Everything(2.0)
    nn.init.constant_(two.frozen, 8.0)
    with pytest.raises(
        MergeError, match=r"frozen: frozen parameters must be equal .* differ by up to 1; .*requires_grad_"
    ):
        merge_modules(one, two)
    two = Everything(2.0)
    two.table += 1
    with pytest.raises(MergeError, match="table: buffers must be equal"):
        merge_modules(one, two)


def test_every_difference_is_listed_in_one_message():
    one = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3), "c": nn.Linear(2, 2), "d": nn.Linear(1, 1)})
    two = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 4), "c": nn.LayerNorm(2), "e": nn.Linear(1, 1)})
    one["a"].weight.requires_grad_(False)
    with pytest.raises(MergeError) as caught:
        merge_modules(one, two)
    for line in (
        "a.weight: frozen parameter in model 1 and linear weight in model 2",
        "b.weight: shape (3, 2) in model 1 and (4, 2) in model 2",
        "b.bias: shape (3,) in model 1 and (4,) in model 2",
        "c.weight: shape (2, 2) in model 1 and (2,) in model 2",
        "c.weight: linear weight in model 1 and normalisation gain or shift in model 2",
        "c.bias: bias in model 1 and normalisation gain or shift in model 2",
        "d.weight: only in model 1, not in model 2",
        "e.bias: only in model 2, not in model 1",
    ):
        assert line in str(caught.value)


def test_tensors_are_paired_by_name_and_not_by_position():
    parts = {"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)}
    one = nn.ModuleDict(parts)
    two = nn.ModuleDict(dict(reversed(copy.deepcopy(parts).items())))
    for parameter in two.parameters():
        parameter.data *= 2
    merged = merge_modules(one, two)
    assert torch.equal(merged["first"].weight, 3 * parts["first"].weight)


def test_different_ties_are_refused():
    untied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.ReLU(), nn.Linear(3, 3, bias=False))
    with pytest.raises(MergeError, match=r"2.weight: tied to 0.weight in model 1 and not tied in model 2"):
        merge_modules(tied(1.0), untied)


def old_weight_norm(layer):
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize("make", [nn.utils.parametrizations.weight_norm, old_weight_norm], ids=["new", "old"])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 3), lambda: nn.Conv2d(2, 3, 3)], ids=["linear", "convolution"])
def test_weights_behind_a_weight_normalisation_are_summed_as_they_act(make, layer):
    torch.manual_seed(0)
    nets = [make(layer()) for _ in range(2)]
    for net in nets:
        with torch.no_grad():
            length = net.parametrizations.weight.original0 if hasattr(net, "parametrizations") else net.weight_g
            length.mul_(1 + torch.rand_like(length))
    inputs = torch.randn(2, *((4,) if isinstance(nets[0], nn.Linear) else (2, 5, 5)))
    shift = nets[0].bias + nets[1].bias
    merged = merge_modules(*nets)
    bias = shift.reshape(-1, *[1] * (inputs.ndim - 2))
    expected = sum(net(inputs) - net.bias.reshape(bias.shape) for net in nets) + bias
    torch.testing.assert_close(merged(inputs), expected, rtol=1e-5, atol=1e-6)
    # It is normalised as before: both of its parameters can be trained on.
    merged(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in merged.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(2, 2)), "remove_parametrizations first"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)), "remove_parametrizations first"),
        (lambda: nn.utils.spectral_norm(nn.Linear(2, 2)), "remove_spectral_norm first"),
        (lambda: nn.LazyLinear(2), "run one batch through the module first"),
    ],
    ids=["orthogonal", "spectral", "old spectral_norm", "lazy"],
)
def test_tensors_without_a_meaningful_sum_are_refused(make, message):
    with pytest.raises(MergeError, match=message):
        merge_modules(make(), make())


@pytest.mark.parametrize("coefficients", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_coefficients_must_be_one_finite_number_per_network(coefficients):
    with pytest.raises(ValueError, match="2 finite numbers, one per network, got"):
        merge_modules(linear(1), linear(1), coefficients=coefficients)


def test_arguments_must_be_modules():
    with pytest.raises(TypeError, match=r"expected a module, got OrderedDict; load a checkpoint"):
        merge_modules(linear(1), linear(1).state_dict())


def test_compiled_modules_merge_with_plain_ones():
    merged = merge_modules(torch.compile(linear(1), backend="eager"), linear(2))
    assert type(merged) is nn.Linear
    assert merged.weight.unique().item() == 3.0


def test_modules_that_keep_tensors_on_a_graph_can_be_merged():
    one, two = linear(1), linear(2)
    one.history = {"losses": [one(torch.ones(1, 2)).sum()]}
    merged = merge_modules(one, two)
    assert not merged.history["losses"][0].requires_grad
    assert one.history["losses"][0].requires_grad


def test_complex_weights():
    nets = [nn.Linear(2, 2, dtype=torch.complex64) for _ in range(2)]
    assert torch.equal(merge_modules(*nets).weight, nets[0].weight + nets[1].weight)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm, nn.RMSNorm, lambda n: nn.GroupNorm(1, n)])
def test_normalisation_is_averaged_whatever_its_class(norm):
    merged = merge_modules(norm(4), norm(4))
    assert merged.weight.unique().tolist() == [1.0]


def test_order_of_many_networks_does_not_matter():
    nets = [random_net(seed) for seed in range(3)]
    first = state(merge_modules(*nets))
    for order in itertools.permutations(nets):
        for name, tensor in state(merge_modules(*order)).items():
            torch.testing.assert_close(tensor, first[name], rtol=1e-6, atol=1e-7)


def test_weights_that_all_networks_share_are_named():
    one, two = (nn.Sequential(linear(5), linear(value)) for value in (1, 2))
    for layer in (one[0], two[0]):
        nn.init.zeros_(layer.bias)
    with pytest.warns(UserWarning, match=r"^0.weight: equal in all networks, so the sum multiplies them by 2"):
        merge_modules(one, two)
    merge_modules(one, two, coefficients=[0.5, 0.5])
    for layer in (one[0], two[0]):
        layer.requires_grad_(False)
    assert merge_modules(one, two)[0].weight.unique().item() == 5


def test_a_base_may_be_frozen_differently():
    one, two, base = Everything(1.0), Everything(3.0), Everything(0.0)
    base.frozen.requires_grad_(True)
    assert merge_modules(one, two, base=base).frozen.unique().item() == 7


def test_differences_of_the_base_are_called_so():
    with pytest.raises(MergeError, match=r"weight: shape \(2, 2\) in model 1 and \(3, 2\) in base"):
        merge_modules(linear(1), linear(2), base=nn.Linear(2, 3))


def test_masks_must_be_equal_and_matrices_in_norm_classes_are_summed():
    class PreNormLinear(nn.Linear):
        pass

    one, two = PreNormLinear(2, 2), PreNormLinear(2, 2)
    assert torch.equal(merge_modules(one, two).weight, one.weight + two.weight)
    for net, mask in ((one, [True, False]), (two, [True, True])):
        net.register_buffer("mask", torch.tensor(mask))
    with pytest.raises(MergeError, match=r"mask: buffers must be equal in all networks, and these differ by up to 1$"):
        merge_modules(one, two)


def test_attributes_that_cannot_be_copied_are_named():
    one, two = linear(1), linear(2)
    one.guard = threading.Lock()
    with pytest.raises(TypeError, match=r"Linear can't be copied: .*lock.* \(attribute guard\)\. Delete or replace"):
        merge_modules(one, two)
