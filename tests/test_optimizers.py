import copy
import functools
import inspect
import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lightning_lowrank import optimizers
from lightning_lowrank.optimizers import (
    Decay,
    StepRecord,
    bound,
    decay_kind,
    decay_rate,
    direction,
    register_optimizer,
    spectral_limit,
)

WD = 0.3
VECTOR, MATRIX, KERNEL = (7,), (6, 4), (3, 2, 3, 3)
ANY = (VECTOR, MATRIX, KERNEL)
MUON = getattr(torch.optim, "Muon", None)
needs_muon = pytest.mark.skipif(MUON is None, reason="torch.optim.Muon came with torch 2.9")


def parameters(shapes=ANY, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def set_gradients(params, step=0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (3 * torch.randn(p.shape, generator=generator, dtype=torch.float64) + 1).to(p.dtype)


def oracle(group, before, after):
    """What u is by definition, in float64."""
    lr, wd = float(group["lr"]), group["weight_decay"]
    return ((1 - lr * wd) * before.double() - after.detach().double()) / lr


def relative_error(u, expected):
    return ((u.double() - expected).norm() / expected.norm()).item()


def run_and_compare(make, shapes=ANY, dtype=torch.float64, steps=7, lr_of=None):
    """The largest relative error of the directions over some real steps, after all of them were found."""
    params = parameters(shapes, dtype)
    optimizer = make(params)
    (group,) = optimizer.param_groups
    worst = 0.0
    for step in range(steps):
        set_gradients(params, step)
        if lr_of is not None:
            group["lr"] = lr_of(step)
        before = [p.detach().clone() for p in params]
        record = StepRecord(optimizer)
        optimizer.step()
        found = record.directions()
        assert found.keys() == {id(p) for p in params}
        for p, old in zip(params, before, strict=True):
            assert found[id(p)].shape == p.shape
            worst = max(worst, relative_error(found[id(p)], oracle(group, old, p)))
    return worst


def from_state(optimizer, params):
    return all(direction(optimizer, optimizer.param_groups[0], p) is not None for p in params)


class Lion(torch.optim.Optimizer):
    """Chen et al., arXiv:2302.06675, with the flag that third-party optimizers carry; writes to ``.data``."""

    def __init__(self, params, lr=0.01, weight_decay=WD, **flags):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **flags})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                u = momentum.lerp(p.grad, 0.1).sign()
                p.data.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])
                momentum.lerp_(p.grad, 0.01)
                self.state[p]["u"] = u


decoupled_lion = functools.partial(Lion, weight_decouple=True)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(optimizers, "_REGISTERED", {})


ADAM_LIKE = [
    ("AdamW", {}),
    ("AdamW", {"amsgrad": True}),
    ("AdamW", {"amsgrad": True, "maximize": True, "betas": (0.5, 0.8), "eps": 1e-2}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"fused": True}),
    ("AdamW", {"lr": torch.tensor(0.02, dtype=torch.float64)}),
    # In float32 torch itself rounds a tensor of 0.8.
    ("AdamW", {"betas": tuple(torch.tensor([0.8, 0.9], dtype=torch.float64)), "lr": torch.tensor(0.02).double()}),
    ("Adam", {"decoupled_weight_decay": True}),
    ("Adam", {"decoupled_weight_decay": True, "amsgrad": True, "foreach": True}),
    ("NAdam", {"decoupled_weight_decay": True}),
    ("NAdam", {"decoupled_weight_decay": True, "maximize": True, "momentum_decay": 0.3, "betas": (0.7, 0.95)}),
    ("NAdam", {"decoupled_weight_decay": True, "foreach": True}),
    # With betas of 0.999 the first five steps are not rectified and the next two are.
    ("RAdam", {"decoupled_weight_decay": True}),
    ("RAdam", {"decoupled_weight_decay": True, "maximize": True, "betas": (0.6, 0.9), "foreach": True}),
    # 2 / (1 - 0.6) - 1 is 4 in floating point, a pole of the rectification, which is never used there.
    ("RAdam", {"decoupled_weight_decay": True, "betas": (0.9, 0.6)}),
    ("Adafactor", {}),
    ("Adafactor", {"maximize": True, "foreach": True, "d": 1.5}),
    ("Adafactor", {"eps": (1e-3, 2.0)}),  # theta's root mean square is below eps2
    ("Adafactor", {"lr": 0.6, "beta2_decay": -0.5}),  # 1 / sqrt(t) is below lr from the third step on
    ("Adafactor", {"lr": torch.tensor(0.6, dtype=torch.float64)}),
]


def make_optimizer(name, options):
    options = {"lr": 0.05, "weight_decay": WD, **options}
    return functools.partial(getattr(torch.optim, name), **options)


def supports(name, options):
    known = inspect.signature(getattr(torch.optim, name).__init__).parameters
    return set(options) <= set(known)


@pytest.mark.parametrize(("name", "options"), ADAM_LIKE, ids=str)
def test_direction_from_state_is_that_of_the_step(name, options):
    if not supports(name, options):
        pytest.skip(f"this torch's {name} has not all of {sorted(options)}")
    make = make_optimizer(name, options)
    assert run_and_compare(make) < 1e-9
    params = parameters()
    optimizer = make(params)
    set_gradients(params)
    optimizer.step()
    assert from_state(optimizer, params)


@needs_muon
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_direction_is_that_of_the_step(shape, adjust, nesterov):
    # Newton-Schulz runs in bfloat16, good to three digits at best; but the direction is what torch's own function makes
    # of the same numbers, so it is compared to float64 accuracy.
    make = functools.partial(MUON, lr=0.05, weight_decay=WD, nesterov=nesterov, adjust_lr_fn=adjust)
    assert run_and_compare(make, shapes=(shape,), steps=3) < 1e-9


@needs_muon
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_direction_changes_no_state_in_bfloat16(nesterov):
    params = parameters((MATRIX,), torch.bfloat16)
    optimizer = MUON(params, lr=0.05, nesterov=nesterov)
    set_gradients(params)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    grad = params[0].grad.clone()
    assert direction(optimizer, optimizer.param_groups[0], params[0]).shape == MATRIX
    buffer = optimizer.state[params[0]]["momentum_buffer"]
    assert torch.equal(buffer, state["state"][0]["momentum_buffer"])
    assert torch.equal(params[0].grad, grad)


@needs_muon
def test_muon_is_measured_by_displacement_where_torch_hides_its_iteration(monkeypatch):
    closed = optimizers._Rule(Decay.DECOUPLED, bound="spectral")
    monkeypatch.setattr(optimizers, "_torch_rule", lambda cls, step: closed)
    assert run_and_compare(functools.partial(MUON, lr=0.05, weight_decay=WD), shapes=(MATRIX,)) < 1e-9


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam"])
def test_step_counts_on_an_accelerator_are_read_as_tensors(name, monkeypatch):
    options = {} if name == "AdamW" else {"decoupled_weight_decay": True}
    params = parameters()
    optimizer = make_optimizer(name, options)(params)
    for step in range(7):
        set_gradients(params, step)
        optimizer.step()
        group = optimizer.param_groups[0]
        expected = [direction(optimizer, group, p) for p in params]
        with monkeypatch.context() as patch:
            patch.setattr(optimizers, "_scalar", lambda value: value.double())
            for p, u in zip(params, expected, strict=True):
                torch.testing.assert_close(direction(optimizer, group, p), u, rtol=1e-12, atol=0)


def test_adafactor_says_nan_where_its_step_may_have_come_from_two_places():
    # The first step has root mean square 1, so at lr = 1 it is as long as the parameter.
    params = parameters((VECTOR,))
    optimizer = torch.optim.Adafactor(params, lr=1.0, weight_decay=0.1)
    set_gradients(params)
    optimizer.step()
    assert direction(optimizer, optimizer.param_groups[0], params[0]).isnan().all()


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "Adafactor"])
def test_direction_follows_the_learning_rate_from_warmup_on(name):
    options = {"decoupled_weight_decay": True} if name == "NAdam" else {}
    assert run_and_compare(make_optimizer(name, options), lr_of=lambda step: 1e-3 * (step + 1)) < 1e-9


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "Adafactor"])
def test_direction_at_a_learning_rate_of_zero_is_finite(name):
    options = {"decoupled_weight_decay": True} if name in ("NAdam", "RAdam") else {}
    params = parameters()
    optimizer = make_optimizer(name, {"lr": 0.0, **options})(params)
    set_gradients(params)
    optimizer.step()
    assert all(direction(optimizer, optimizer.param_groups[0], p).isfinite().all() for p in params)


def test_there_is_no_direction_without_step_gradient_decoupled_decay_or_real_numbers():
    (fresh,) = parameters((VECTOR,))
    optimizer = torch.optim.AdamW([fresh], weight_decay=WD)
    assert direction(optimizer, optimizer.param_groups[0], fresh) is None
    assert len(optimizer.state) == 0, "reading must not create a state"

    params = parameters()
    for optimizer in (torch.optim.Adam(params, weight_decay=WD), torch.optim.AdamW(params, weight_decay=0.0)):
        set_gradients(params)
        optimizer.step()
        assert direction(optimizer, optimizer.param_groups[0], params[0]) is None

    optimizer = torch.optim.NAdam(params, weight_decay=WD, decoupled_weight_decay=True)
    optimizer.step()
    params[0].grad = None
    assert direction(optimizer, optimizer.param_groups[0], params[0]) is None


def test_complex_parameters_are_measured_by_displacement():
    theta = torch.tensor([1 + 2j, -3 + 0.5j], dtype=torch.complex128, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=0.1, weight_decay=WD)
    theta.grad = torch.tensor([2 - 1j, 0.5j], dtype=torch.complex128)
    before, record = theta.detach().clone(), StepRecord(optimizer)
    optimizer.step()
    expected = ((1 - 0.1 * WD) * before - theta.detach()) / 0.1
    torch.testing.assert_close(record.directions()[id(theta)], expected)


# Records.


def test_displacement_of_a_third_party_optimizer_is_its_direction():
    params = parameters()
    optimizer = decoupled_lion(params)
    assert run_and_compare(decoupled_lion) < 1e-9
    set_gradients(params)
    record = StepRecord(optimizer)
    optimizer.step()
    for p in params:
        torch.testing.assert_close(record.directions().get(id(p), optimizer.state[p]["u"]), optimizer.state[p]["u"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_displacements_are_right_to_one_percent_or_left_out(dtype):
    kept = []
    for lr in (10.0**-k for k in range(7)):
        params = parameters(dtype=dtype)
        optimizer = decoupled_lion(params, lr=lr)
        set_gradients(params)
        record = StepRecord(optimizer)
        optimizer.step()
        found = record.directions()
        errors = [relative_error(found[id(p)], optimizer.state[p]["u"].double()) for p in params if id(p) in found]
        assert all(error < 0.01 for error in errors), (lr, errors)
        kept.append(len(errors))
    assert kept[0] == 3
    assert kept[-1] == 0
    assert kept == sorted(kept, reverse=True)


def test_nothing_that_happens_after_the_step_changes_its_directions():
    params = parameters()
    optimizer = torch.optim.NAdam(params, lr=0.05, weight_decay=WD, decoupled_weight_decay=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    set_gradients(params)
    before, group = [p.detach().clone() for p in params], dict(optimizer.param_groups[0])
    record = StepRecord(optimizer)
    optimizer.step()
    expected = [oracle(group, old, p) for old, p in zip(before, params, strict=True)]
    schedule.step()
    optimizer.zero_grad()
    set_gradients(params, 1)
    optimizer.step()
    found = record.directions()
    assert all(relative_error(found[id(p)], u) < 1e-9 for p, u in zip(params, expected, strict=True))


def test_record_made_in_the_closure_measures_the_step_around_it():
    (theta,) = parameters((VECTOR,))
    optimizer = torch.optim.AdamW([theta], lr=0.05, weight_decay=WD)
    records = []

    def closure():
        optimizer.zero_grad()
        loss = (theta - 2).square().sum()
        loss.backward()
        records.append(StepRecord(optimizer))
        return loss

    before = theta.detach().clone()
    optimizer.step(closure)
    found = records[0].directions()
    assert relative_error(found[id(theta)], oracle(optimizer.param_groups[0], before, theta)) < 1e-9


def test_step_that_extends_its_superclass_is_measured_at_its_outer_end():
    class Doubled(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.sub_(p.grad, alpha=group["lr"])

    # An instance of the superclass makes torch wrap its step as well, which then ends twice.
    torch.optim.AdamW(parameters())
    assert run_and_compare(functools.partial(Doubled, lr=0.05, weight_decay=WD)) < 1e-9


def test_parameters_without_gradient_or_decoupled_decay_are_left_out():
    a, b, c = parameters((VECTOR, VECTOR, VECTOR))
    optimizer = torch.optim.AdamW([{"params": [a, b]}, {"params": [c], "weight_decay": 0.0}], weight_decay=WD)
    set_gradients([a, b, c])
    optimizer.step()
    b.grad = None
    record = StepRecord(optimizer)
    optimizer.step()
    assert record.directions().keys() == {id(a)}


def test_record_without_a_step_is_empty():
    params = parameters()
    optimizer = decoupled_lion(params)
    set_gradients(params)
    assert StepRecord(optimizer).directions() == {}


@pytest.mark.parametrize("fused", [False, True])
def test_step_that_the_gradient_scaler_skips_has_no_direction(fused):
    params = parameters(dtype=torch.float32)
    optimizer = torch.optim.AdamW(params, lr=0.05, weight_decay=WD, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
    outcomes = []
    for overflow in (False, True, False):
        loss = sum((p - 2).square().sum() for p in params)
        scaler.scale(loss).backward()
        if overflow:
            params[0].grad[0] = math.inf
        before = [p.detach().clone() for p in params]
        record = StepRecord(optimizer)
        scaler.step(optimizer)
        scaler.update()
        found = record.directions()
        outcomes.append(len(found))
        for p, old in zip(params, before, strict=True):
            assert not found or relative_error(found[id(p)], oracle(optimizer.param_groups[0], old, p)) < 1e-4
        optimizer.zero_grad()
    assert outcomes == [3, 0, 3]


def test_record_does_not_change_the_run_and_leaves_no_hook():
    def train(measured):
        params = parameters(dtype=torch.float32)
        optimizer = decoupled_lion(params)
        for step in range(5):
            set_gradients(params, step)
            record = StepRecord(optimizer) if measured else None
            optimizer.step()
            if record is not None:
                assert record.directions()
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        return [*params, *(value for state in optimizer.state.values() for value in state.values())]

    assert all(torch.equal(a, b) for a, b in zip(train(True), train(False), strict=True))


def test_failing_registered_direction_is_raised_by_the_record_not_by_the_step(registry):
    def broken(optimizer, group, parameter):
        raise RuntimeError("no state yet")

    register_optimizer(Lion, decay="decoupled", direction=broken)
    params = parameters()
    optimizer = Lion(params)
    set_gradients(params)
    record = StepRecord(optimizer)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no state yet"):
        record.directions()


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


# Without Adafactor, whose own step fails on shards.
@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam", "Muon"])
def test_directions_of_dtensors(name, mesh):
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    options = {"decoupled_weight_decay": True} if name in ("NAdam", "RAdam") else {}
    plain = parameters((MATRIX,))
    sharded = [distribute_tensor(plain[0].detach(), mesh, [Shard(0)]).requires_grad_()]
    found = []
    for params in (plain, sharded):
        optimizer = make_optimizer(name, options)(params)
        set_gradients(plain)
        if params is sharded:
            sharded[0].grad = distribute_tensor(plain[0].grad, mesh, [Shard(0)])
        record = StepRecord(optimizer)
        optimizer.step()
        found.append(record.directions()[id(params[0])])
        assert from_state(optimizer, params) == (params is plain or name != "Muon")
    assert isinstance(found[1], DTensor)
    torch.testing.assert_close(found[1].to_local(), found[0], rtol=1e-9, atol=1e-9)


# Kinds and the registry.


def group_of(make, **options):
    optimizer = make(parameters((MATRIX,)), **options)
    return optimizer, optimizer.param_groups[0]


class OwnSGD(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class InheritedSGD(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        *((getattr(torch.optim, name), Decay.COUPLED) for name in ("SGD", "Adam", "Adamax", "NAdam", "RAdam")),
        *((getattr(torch.optim, name), Decay.COUPLED) for name in ("Adagrad", "Adadelta", "RMSprop", "ASGD")),
        *(
            (getattr(torch.optim, n), Decay.DECOUPLED)
            for n in ("AdamW", "Adafactor", "Muon")
            if hasattr(torch.optim, n)
        ),
        (functools.partial(torch.optim.NAdam, decoupled_weight_decay=True), Decay.DECOUPLED),
        (functools.partial(torch.optim.RAdam, decoupled_weight_decay=True), Decay.DECOUPLED),
        (InheritedSGD, Decay.COUPLED),
        (OwnSGD, Decay.UNKNOWN),
        (Lion, Decay.UNKNOWN),
        (functools.partial(Lion, weight_decouple=True), Decay.DECOUPLED),
        (functools.partial(Lion, weight_decouple=False), Decay.COUPLED),
        (functools.partial(Lion, decoupled_weight_decay=True), Decay.DECOUPLED),
        (functools.partial(Lion, weight_decouple=True, fixed_decay=True), Decay.UNKNOWN),
    ],
    ids=str,
)
def test_decay_kinds(make, expected):
    optimizer, group = group_of(make, weight_decay=WD)
    assert decay_kind(optimizer, group) is expected
    assert decay_kind(optimizer, {**group, "weight_decay": 0.0}) is Decay.NONE
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the instance's step
    assert decay_kind(optimizer, group) is expected


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam"])
def test_optimizers_without_decay(name):
    optimizer, group = group_of(getattr(torch.optim, name))
    assert decay_kind(optimizer, group) is Decay.NONE
    assert decay_rate(optimizer, group) == 0


@pytest.mark.parametrize("decay", ["coupled", "decoupled", "none"])
def test_registered_class_and_its_subclasses_win_over_flags(registry, decay):
    class Child(Lion):
        pass

    class Other(Lion):
        pass

    register_optimizer(Lion, decay=decay)
    register_optimizer(Other, decay="none")
    for cls, expected in ((Lion, Decay(decay)), (Child, Decay(decay)), (Other, Decay.NONE)):
        for flag in (True, False):
            assert decay_kind(*group_of(cls, weight_decouple=flag)) is expected
    assert decay_kind(*group_of(Lion, weight_decay=0.0)) is Decay.NONE
    register_optimizer(Lion, decay="coupled")
    assert decay_kind(*group_of(Child)) is Decay.COUPLED


def test_registered_class_wins_over_torchs_own_rules(registry):
    register_optimizer(InheritedSGD, decay="coupled", rate=lambda optimizer, group: 7.0)
    assert decay_rate(*group_of(InheritedSGD, weight_decay=WD)) == 7.0
    assert decay_rate(*group_of(torch.optim.SGD, weight_decay=WD, lr=0.1)) == pytest.approx(0.1 * WD)


def test_registered_direction_is_used_and_nothing_is_copied(registry):
    register_optimizer(Lion, decay="decoupled", direction=lambda optimizer, group, p: optimizer.state[p]["u"])
    # So small a step that no displacement would show it.
    params = parameters(dtype=torch.float32)
    optimizer = Lion(params, lr=1e-8)
    set_gradients(params)
    record = StepRecord(optimizer)
    optimizer.step()
    found = record.directions()
    assert all(found[id(p)] is optimizer.state[p]["u"] for p in params)
    assert decay_rate(optimizer, optimizer.param_groups[0]) == pytest.approx(1e-8 * WD)


def test_registered_direction_of_the_wrong_shape_is_refused(registry):
    register_optimizer(Lion, decay="decoupled", direction=lambda optimizer, group, p: p.flatten())
    optimizer, group = group_of(Lion)
    with pytest.raises(ValueError, match=r"Lion has shape \(24,\) and its parameter \(6, 4\)"):
        direction(optimizer, group, group["params"][0])


@pytest.mark.parametrize("cls", [int, torch.optim.Optimizer, "AdamW", None])
def test_only_optimizer_classes_are_registered(registry, cls):
    with pytest.raises(TypeError, match=r"subclass of torch.optim.Optimizer, got"):
        register_optimizer(cls, decay="none")


def test_registration_refuses_what_does_not_go_together(registry):
    with pytest.raises(ValueError, match=r"\['coupled', 'decoupled', 'none'\], got 'unknown'"):
        register_optimizer(Lion, decay="unknown")
    with pytest.raises(ValueError, match="direction belongs to decay='decoupled', got decay='coupled'"):
        register_optimizer(Lion, decay="coupled", direction=lambda *_: None)
    with pytest.raises(ValueError, match="rate belongs to decay='coupled', got decay='decoupled'"):
        register_optimizer(Lion, decay="decoupled", rate=lambda *_: 0.0)
    assert optimizers._REGISTERED == {}


# Cumulative decay.

SGD = [
    {},
    {"dampening": 0.5},  # without momentum torch ignores it
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.9, "dampening": 0.5},
    {"momentum": 0.5, "dampening": 0.2, "maximize": True},
]
DECOUPLED = [torch.optim.AdamW, torch.optim.Adafactor, decoupled_lion, *([MUON] if MUON else [])]


def decayed_by(optimizer, params, steps, skip=0):
    """By how much log|theta| falls per step when the gradient is zero."""
    norms = []
    for _ in range(skip + steps + 1):
        norms.append(params[0].detach().norm())
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    return (norms[skip] / norms[-1]).log().item() / steps


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_decays_at_the_rate_that_tau_says(options):
    params = parameters((MATRIX,))
    optimizer = torch.optim.SGD(params, lr=1e-2, weight_decay=1e-3, **options)
    rate = decay_rate(optimizer, optimizer.param_groups[0])
    # The true rate is higher by the share rate * momentum / (1 - momentum), to first order.
    second_order = rate / (1 - options.get("momentum", 0.0))
    assert decayed_by(optimizer, params, steps=500, skip=300) == pytest.approx(rate, rel=2 * second_order)


@pytest.mark.parametrize("make", DECOUPLED, ids=str)
def test_decoupled_optimizers_decay_at_the_rate_that_tau_says(make):
    params = parameters((MATRIX,))
    optimizer = make(params, lr=1e-3, weight_decay=1e-2)
    rate = decay_rate(optimizer, optimizer.param_groups[0])
    assert rate == pytest.approx(1e-5)
    assert decayed_by(optimizer, params, steps=10) == pytest.approx(rate, rel=2 * rate)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad", "ASGD", "NAdam", "Adamax", "Adadelta", "RAdam"])
def test_preconditioned_coupled_decay_has_no_rate(name):
    assert math.isnan(decay_rate(*group_of(getattr(torch.optim, name), weight_decay=WD)))


def test_rate_of_unknown_decay_and_of_a_momentum_that_never_forgets_is_nan():
    assert math.isnan(decay_rate(*group_of(Lion)))
    assert math.isnan(decay_rate(*group_of(torch.optim.SGD, momentum=1.0, weight_decay=WD)))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_rate_at_a_tensor_learning_rate_is_a_tensor_and_is_not_waited_for(make):
    optimizer, group = group_of(make, lr=torch.tensor(0.5), weight_decay=WD)
    group["lr"] = torch.tensor(0.5, device="meta")  # has no value to wait for
    assert decay_rate(optimizer, group).device.type == "meta"
    group["lr"] = torch.tensor(0.5)
    assert decay_rate(optimizer, group).item() == pytest.approx(0.5 * WD)


# Fixed points.


def test_adamw_on_a_full_batch_problem_ends_at_its_own_fixed_point_and_not_the_gradients():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 10, generator=generator, dtype=torch.float64)
    targets = inputs @ (10 * torch.randn(10, generator=generator, dtype=torch.float64))
    theta = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([theta], lr=0.02, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        (inputs @ theta - targets).square().mean().backward()
        optimizer.step()
        u = direction(optimizer, optimizer.param_groups[0], theta)
        schedule.step()
    values = theta.detach()
    cosine = functools.partial(torch.nn.functional.cosine_similarity, dim=0)
    assert cosine(values, -u) > 0.999
    assert (u + values).norm() / values.norm() < 0.02
    assert cosine(values, -theta.grad) < 0.8
    assert bound(optimizer, optimizer.param_groups[0]) == "linf"
    assert 0.99 < values.abs().max() <= 1 + 1e-3


@needs_muon
@pytest.mark.parametrize("shape", [(12, 3), (3, 12)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_under_a_constant_gradient_ends_at_its_spectral_limit(shape, adjust):
    params = parameters((shape,))
    optimizer = MUON(params, lr=0.1, weight_decay=2.0, adjust_lr_fn=adjust)
    (gradient,) = parameters((shape,), seed=1)
    for _ in range(40):
        params[0].grad = gradient.detach().clone()
        optimizer.step()
    group = optimizer.param_groups[0]
    assert bound(optimizer, group) == "spectral"
    ratio = 2.0 * torch.linalg.matrix_norm(params[0].detach(), 2).item() / spectral_limit(group, params[0].shape)
    # What Newton-Schulz leaves of a singular value of 1, and bfloat16's rounding.
    assert 0.68 < ratio < 1.21


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (functools.partial(torch.optim.AdamW, weight_decay=WD), "linf"),
        (functools.partial(torch.optim.AdamW, weight_decay=0.0), None),
        (functools.partial(torch.optim.Adam, weight_decay=WD), None),
        (functools.partial(torch.optim.NAdam, weight_decay=WD, decoupled_weight_decay=True), None),
        (functools.partial(torch.optim.Adafactor, weight_decay=WD), None),
        (functools.partial(torch.optim.SGD, weight_decay=WD), None),
        (decoupled_lion, None),
    ],
    ids=str,
)
def test_bounds(make, expected):
    assert bound(*group_of(make)) == expected


@pytest.mark.skipif(not supports("Adam", {"decoupled_weight_decay": True}), reason="newer than this torch")
def test_adam_with_the_flag_is_adamw():
    optimizer, group = group_of(torch.optim.Adam, weight_decay=WD, decoupled_weight_decay=True)
    assert decay_kind(optimizer, group) is Decay.DECOUPLED
    assert bound(optimizer, group) == "linf"
