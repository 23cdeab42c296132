"""What each optimizer does with weight decay, group by group.

Decoupled decay (AdamW, Muon, ...) is the step ``theta_new = (1 - lr * wd) * theta - lr * u`` with a direction ``u`` of
the optimizer's own; its fixed point is ``u = -wd * theta``. Coupled decay adds ``wd * theta`` to the gradient. One
table says which optimizer does what, and users add their own classes to it.
"""

from __future__ import annotations

import enum
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_lowrank.functional._tensors import wide_dtype

Group = Mapping[str, Any]
Direction = Callable[[Optimizer, Group, Tensor], "Tensor | None"]
Rate = Callable[[Optimizer, Group], "float | Tensor"]

# A direction read from the displacement of a parameter is left out where rounding may make up more of it than this:
# what is compared with it (cosines, residuals) is read to two digits.
_MAX_ROUNDING = 0.01

# torch's Muon, from torch 2.9 on; its orthogonalisation is not public.
_MUON: Any = getattr(torch.optim, "_muon", None)
_MUON_IS_OPEN = hasattr(_MUON, "_zeropower_via_newtonschulz") and hasattr(_MUON, "_adjust_lr")


class Decay(enum.Enum):
    """How an optimizer applies a parameter group's weight decay."""

    COUPLED = "coupled"  # wd * theta is added to the gradient: the L2-regularised loss
    DECOUPLED = "decoupled"  # theta shrinks by lr * wd beside the update
    NONE = "none"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class _Rule:
    """What is known of one optimizer class.

    Attributes:
        decay: How it decays, where a torch class's group does not say otherwise.
        direction: u of the last step, read after it; None where only the displacement tells.
        rate: The cumulative decay of one step, for coupled decay that has one.
        bound: The constraint that its decay amounts to; see :func:`bound`.
        whole: Whether ``direction`` needs norms or products of the whole tensor, which a shard does not have.
    """

    decay: Decay
    direction: Direction | None = None
    rate: Rate | None = None
    bound: Literal["linf", "spectral"] | None = None
    whole: bool = False


def register_optimizer(
    cls: type[Optimizer],
    *,
    decay: Literal["coupled", "decoupled", "none"],
    direction: Direction | None = None,
    rate: Rate | None = None,
) -> None:
    """Say how an optimizer class applies its weight decay.

    What is registered holds for the class and its subclasses, before anything this package knows or a parameter group
    declares. The coefficients are read from the groups' ``lr`` and ``weight_decay``; without a positive
    ``weight_decay`` a group has no decay. Registering a class again replaces what was said.

    Args:
        cls: A subclass of ``torch.optim.Optimizer``.
        decay: ``"coupled"``: the step adds ``weight_decay * theta`` to the gradient. ``"decoupled"``: the step is
            ``theta_new = (1 - lr * weight_decay) * theta - lr * u``. ``"none"``: ``weight_decay`` does not decay.
        direction: For decoupled decay, ``direction(optimizer, group, parameter)`` returns u of the step just taken: a
            tensor of the parameter's shape, or None where there is none. It is called right after the step, with the
            gradients still there, and changes nothing. Without it u is measured as a displacement
            (:class:`StepRecord`), which costs a copy of the parameters.
        rate: For coupled decay, ``rate(optimizer, group)`` returns what one step adds to the cumulative decay: by how
            much it shrinks ``log |theta|`` where the loss is flat, such as ``lr * weight_decay / (1 - momentum)``.
            Without it the cumulative decay is NaN.

    Raises:
        TypeError: If ``cls`` is not a proper subclass of ``torch.optim.Optimizer``.
        ValueError: If ``decay`` is none of the three, or ``direction`` or ``rate`` does not go with it.

    Example:
        >>> class Lion(torch.optim.Optimizer):
        ...     "Some optimizer that shrinks its weights by lr * weight_decay."
        >>> register_optimizer(Lion, decay="decoupled")
    """
    if not (inspect.isclass(cls) and issubclass(cls, Optimizer)) or cls is Optimizer:
        raise TypeError(f"cls must be an optimizer class, a subclass of torch.optim.Optimizer, got {cls!r}")
    kinds = [kind.value for kind in Decay if kind is not Decay.UNKNOWN]
    if decay not in kinds:
        raise ValueError(f"decay must be one of {kinds}, got {decay!r}")
    if direction is not None and decay != "decoupled":
        raise ValueError(f"direction belongs to decay='decoupled', got decay={decay!r}; leave direction out")
    if rate is not None and decay != "coupled":
        raise ValueError(
            f"rate belongs to decay='coupled', got decay={decay!r}, whose rate follows from lr and weight_decay; leave"
            " rate out"
        )
    _REGISTERED[cls] = _Rule(Decay(decay), direction, rate)


def decay_kind(optimizer: Optimizer, group: Group) -> Decay:
    """How ``optimizer`` decays the parameters of ``group``.

    Known are registered classes, torch's own optimizers (and subclasses that do not change ``step``) and others that
    declare ``weight_decouple`` or ``decoupled_weight_decay`` in their groups. Any other optimizer with a positive decay
    is unknown, and so is a declared decay that ``fixed_decay`` takes away from the learning rate.

    Example:
        >>> optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
        >>> decay_kind(optimizer, optimizer.param_groups[0])
        <Decay.DECOUPLED: 'decoupled'>
    """
    if not float(group.get("weight_decay") or 0) > 0:
        return Decay.NONE
    rule = _rule(optimizer)
    if rule is not None and (rule.decay is Decay.DECOUPLED or _registered(optimizer) is not None):
        return rule.decay
    declared = group.get("decoupled_weight_decay", group.get("weight_decouple"))
    if declared is not None:
        if declared and group.get("fixed_decay"):
            return Decay.UNKNOWN
        return Decay.DECOUPLED if declared else Decay.COUPLED
    return Decay.UNKNOWN if rule is None else rule.decay


def decay_rate(optimizer: Optimizer, group: Group) -> float | Tensor:
    """What one step at the group's current learning rate adds to the cumulative decay tau.

    ``exp(-tau)`` is by how much a parameter has shrunk where the loss is flat: per step ``lr * wd`` for decoupled decay
    and ``lr * wd * (1 - dampening) / (1 - momentum)`` for SGD, with or without Nesterov (derived in docs/theory.md).
    Both are of first order: SGD with momentum really decays faster by about the share ``rate * momentum / (1 -
    momentum)``, which is 0.1 % at a rate of 1e-4 and momentum 0.9.

    Returns:
        A float, or a tensor on its device where the learning rate is one. 0 without decay; NaN where no scalar says it
        (coupled Adam and other preconditioned steps) or nothing is known.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.01)
        >>> f"{decay_rate(optimizer, optimizer.param_groups[0]):.4f}"
        '0.0100'
    """
    kind = decay_kind(optimizer, group)
    if kind is Decay.NONE:
        return 0.0
    if kind is Decay.DECOUPLED:
        return cast("float | Tensor", group["lr"] * group["weight_decay"])
    rule = _rule(optimizer)
    return math.nan if rule is None or rule.rate is None else rule.rate(optimizer, group)


def direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    """The direction u of the step just taken, from the optimizer's state.

    The step was ``theta_new = (1 - lr * wd) * theta - lr * u``. What was done to the gradient (clipping, unscaling) is
    in u. Call it after ``step()``, while the gradient that the step used is still there and before a scheduler moves
    the learning rate; nothing is modified.

    Returns:
        A tensor of the parameter's shape. None where the decay is not decoupled, no step was taken, or the state does
        not tell: unknown optimizers, complex parameters, shards under Adafactor and Muon. There, see
        :class:`StepRecord`. Adafactor's u is NaN where its step could have come from two places (learning rates near
        1).

    Raises:
        ValueError: If a registered ``direction`` returns another shape than the parameter's.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.AdamW([theta], weight_decay=0.1)
        >>> theta.grad = torch.tensor([3.0, -0.5])
        >>> optimizer.step()
        >>> direction(optimizer, optimizer.param_groups[0], theta)
        tensor([ 1.0000, -1.0000])
    """
    reader = _reader(optimizer, parameter)
    if reader is None or decay_kind(optimizer, group) is not Decay.DECOUPLED:
        return None
    with torch.no_grad():
        u = reader(optimizer, group, parameter)
    if u is not None and u.shape != parameter.shape:
        raise ValueError(
            f"the direction registered for {type(optimizer).__name__} has shape {tuple(u.shape)} and its parameter"
            f" {tuple(parameter.shape)}; return one of the parameter's shape"
        )
    return u


def bound(optimizer: Optimizer, group: Group) -> Literal["linf", "spectral"] | None:
    """The constraint that the group's decoupled decay amounts to, if theory knows one.

    - ``"linf"``: ``wd * max|theta| <= 1`` at the limit points of AdamW (arXiv:2404.04454), and of Adam with
      ``decoupled_weight_decay``, which is the same algorithm. Nothing is claimed for NAdam and RAdam.
    - ``"spectral"``: ``wd * |W|_2`` is at most about :func:`spectral_limit` for Muon (arXiv:2506.15054).

    Example:
        >>> optimizer = torch.optim.AdamW([torch.zeros(1)], weight_decay=0.1)
        >>> bound(optimizer, optimizer.param_groups[0])
        'linf'
    """
    rule = _rule(optimizer)
    return None if rule is None or decay_kind(optimizer, group) is not Decay.DECOUPLED else rule.bound


def spectral_limit(group: Group, shape: torch.Size) -> float:
    """What ``wd * |W|_2`` is to be compared with under torch's Muon: adjusted lr / lr.

    torch scales Muon's update by the shape (``adjust_lr_fn``) but not its decay, so the constraint is not 1. Five
    Newton-Schulz steps leave the singular values of the update between 0.68 and 1.20 (the range of the quintic with
    torch's default coefficients; smaller ones where the update is almost singular), so values up to 1.2 times the limit
    are no violation.

    Args:
        group: A parameter group of ``torch.optim.Muon``.
        shape: ``(out_features, in_features)``.

    Example:
        >>> spectral_limit({"adjust_lr_fn": "match_rms_adamw"}, torch.Size([100, 25]))
        2.0
    """
    return float(_MUON._adjust_lr(1.0, group["adjust_lr_fn"], shape))


class StepRecord:
    """The directions u of one optimizer step, for every parameter with decoupled decay.

    Create it when the gradients are complete, before the step or inside its closure. The first step that ends from then
    on is measured as it ends: from the optimizer's state where that tells (:func:`direction`), else from the
    displacement, ``u = ((1 - lr * wd) * theta - theta_new) / lr``, for which those parameters alone are copied. A step
    that a gradient scaler skips is none.

    Example:
        >>> theta = torch.ones(2, requires_grad=True)
        >>> optimizer = torch.optim.AdamW([theta], weight_decay=0.1)
        >>> theta.grad = torch.tensor([3.0, -0.5])
        >>> record = StepRecord(optimizer)
        >>> optimizer.step()
        >>> record.directions()[id(theta)]
        tensor([ 1.0000, -1.0000])
    """

    def __init__(self, optimizer: Optimizer) -> None:
        held = list(_decoupled(optimizer))
        self._parameters = {id(parameter) for _, parameter in held}
        self._before = {
            id(parameter): parameter.detach().clone() for _, parameter in held if _reader(optimizer, parameter) is None
        }
        self._directions: dict[int, Tensor] | None = None
        self._error: Exception | None = None
        self._over = False
        # A step that calls the step of its superclass ends twice, and the later end is the one to measure; but the
        # begin of another step closes the record.
        self._hooks = [
            optimizer.register_step_pre_hook(self._on_begin),
            optimizer.register_step_post_hook(self._on_end),
        ]

    def directions(self) -> dict[int, Tensor]:
        """Return u by ``id`` of the parameter; call it once, after the step. Empty if no step was taken.

        Left out are parameters without a gradient or a direction, and displacements that may be off by more than 1 %
        because the parameter's type rounds them: where ``eps * |theta| > 0.01 * lr * |u|``.

        Raises:
            Exception: Whatever went wrong in measuring; the step itself was not disturbed.
        """
        for hook in self._hooks:
            hook.remove()
        self._before.clear()
        if self._error is not None:
            raise self._error
        return self._directions or {}

    def _on_begin(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._over = self._over or self._directions is not None

    def _on_end(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._over or self._error is not None:
            return
        try:
            # Fused optimizers run under a gradient scaler, and skip an overflow, inside the step.
            found_inf = getattr(optimizer, "found_inf", None)
            self._directions = {} if found_inf is not None and bool(found_inf) else self._measure(optimizer)
        except Exception as error:
            self._error = error

    @torch.no_grad()
    def _measure(self, optimizer: Optimizer) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        displaced: dict[int, Tensor] = {}
        errors: list[Tensor] = []
        for group, parameter in _decoupled(optimizer):
            key = id(parameter)
            if key in self._before:
                displaced[key], error = _displacement(group, self._before[key], parameter.detach())
                errors.append(error)
            elif key in self._parameters:
                u = direction(optimizer, group, parameter)
                found |= {} if u is None else {key: u}
        # One synchronisation for all of them.
        small = (torch.stack([e.to(errors[0].device) for e in errors]) <= _MAX_ROUNDING).tolist() if errors else []
        return found | {key: u for (key, u), keep in zip(displaced.items(), small, strict=True) if keep}


def _decoupled(optimizer: Optimizer) -> Iterator[tuple[Group, Tensor]]:
    """The parameters that a step moves under decoupled decay, with their groups."""
    for group in optimizer.param_groups:
        if decay_kind(optimizer, group) is Decay.DECOUPLED:
            yield from ((group, parameter) for parameter in group["params"] if parameter.grad is not None)


def _displacement(group: Group, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Read u from where a step has led, and the part of it that may be rounding, a real tensor without dimensions."""
    lr, wd = group["lr"], group["weight_decay"]
    wide = torch.promote_types(before.dtype, wide_dtype(before))
    moved = (1 - lr * wd) * before.to(wide) - after.to(wide)
    norms = torch.linalg.vector_norm(before), torch.linalg.vector_norm(moved)
    # A shard's norms would let the ranks decide differently.
    whole, length = (norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms)
    rounding = torch.finfo(before.dtype).eps * whole.to(wide_dtype(before)) / length
    return (moved / lr).to(torch.promote_types(before.dtype, torch.float32)), rounding


def _sgd_rate(optimizer: Optimizer, group: Group) -> float | Tensor:
    momentum = group["momentum"]
    # torch's SGD uses its dampening only together with a momentum. From 1 on the momentum never forgets.
    gain = (1 - group["dampening"]) / (1 - momentum) if 0 < momentum < 1 else 1.0 if momentum == 0 else math.nan
    return cast("float | Tensor", group["lr"] * group["weight_decay"] * gain)


def _scalar(value: Any) -> Any:
    """A step count or running product: a float, but for one on an accelerator, which is not waited for."""
    if not isinstance(value, Tensor):
        return float(value)
    return value.item() if value.device.type == "cpu" else value.to(wide_dtype(value))


def _gradient(group: Group, parameter: Tensor) -> Tensor | None:
    grad = parameter.grad
    return grad if grad is None or not group.get("maximize") else -grad


def _adam_direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    state = optimizer.state.get(parameter)
    if not state:
        return None
    (beta1, beta2), steps = group["betas"], _scalar(state["step"])
    second: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    scale = second.sqrt() / (1 - beta2**steps) ** 0.5 + group["eps"]
    return cast(Tensor, state["exp_avg"] / (1 - beta1**steps) / scale)


def _nadam_direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    state, grad = optimizer.state.get(parameter), _gradient(group, parameter)
    if not state or grad is None:
        return None
    (beta1, beta2), steps = group["betas"], _scalar(state["step"])
    product = _scalar(state["mu_product"])
    now, following = (beta1 * (1 - 0.5 * 0.96 ** (k * group["momentum_decay"])) for k in (steps, steps + 1))
    numerator = grad * ((1 - now) / (1 - product)) + state["exp_avg"] * (following / (1 - product * following))
    return cast(Tensor, numerator / ((state["exp_avg_sq"] / (1 - beta2**steps)).sqrt() + group["eps"]))


def _radam_direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    state = optimizer.state.get(parameter)
    if not state:
        return None
    (beta1, beta2), steps = group["betas"], _scalar(state["step"])
    mean = state["exp_avg"] / (1 - beta1**steps)
    correction = 1 - beta2**steps
    top = 2 / (1 - beta2) - 1
    length = top - 2 * steps * beta2**steps / correction
    rectified = length > 5
    if rectified is False:
        return cast(Tensor, mean)
    # Of the simple moving average's variance; without meaning, and not used, up to a length of 4.
    variance = abs((length - 4) * (length - 2) * top / ((top - 4) * (top - 2) * length))
    scale = (variance * correction) ** 0.5 / (state["exp_avg_sq"].sqrt() + group["eps"])
    return cast(Tensor, mean * (scale if rectified is True else torch.where(rectified, scale, 1.0)))


def _adafactor_direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    state, grad = optimizer.state.get(parameter), _gradient(group, parameter)
    if not state or grad is None:
        return None
    lr, (eps1, eps2) = group["lr"], group["eps"]
    eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else eps1
    if "row_var" in state:
        variance = state["row_var"] @ state["col_var"] / state["row_var"].mean(dim=-2, keepdim=True).clamp(min=eps1)
    else:
        variance = state["variance"]
    update = variance.clamp(min=eps1**2).rsqrt() * grad
    update = update / (_rms(update) / group["d"]).clamp(min=1)
    # The relative step min(lr, 1 / sqrt(t)) in units of lr.
    excess = lr * _scalar(state["step"]) ** 0.5
    relative = 1 / (excess.clamp(min=1) if isinstance(excess, Tensor) else max(1.0, excess))
    # The step is lr * relative * max(eps2, r) * update, with r the root mean square of theta *before* it. Squaring
    # (1 - lr * wd) * theta = theta_new + lr * relative * r * update gives a quadratic equation for r; where its root is
    # below eps2, so was r. It has one positive root unless the step is as long as the parameter itself.
    long = lr * relative
    a = (1 - lr * group["weight_decay"]) ** 2 - (long * _rms(update)).square()
    b = long * (parameter * update).mean()
    root = (b + (b.square() + a * parameter.square().mean()).sqrt()) / a
    before = torch.where(a > 0, root, math.nan)
    return cast(Tensor, update * relative * before.clamp(min=eps2))


def _rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt()


def _muon_direction(optimizer: Optimizer, group: Group, parameter: Tensor) -> Tensor | None:
    state, grad = optimizer.state.get(parameter), parameter.grad
    if not state or grad is None:
        return None
    momentum = state["momentum_buffer"]
    # A copy in either case: the iteration works in place on bfloat16 input.
    update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum.clone()
    u = _MUON._zeropower_via_newtonschulz(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
    return cast(Tensor, u.to(parameter.dtype) * spectral_limit(group, parameter.shape))


# By name, since not every torch has them all. Subclasses stand before their superclasses.
_TORCH: dict[str, _Rule] = {
    "AdamW": _Rule(Decay.DECOUPLED, _adam_direction, bound="linf"),
    "Adafactor": _Rule(Decay.DECOUPLED, _adafactor_direction, whole=True),
    "Muon": _Rule(Decay.DECOUPLED, _muon_direction if _MUON_IS_OPEN else None, bound="spectral", whole=True),
    "SGD": _Rule(Decay.COUPLED, rate=_sgd_rate),
    # The directions of these hold where the group says `decoupled_weight_decay`.
    "Adam": _Rule(Decay.COUPLED, _adam_direction, bound="linf"),
    "NAdam": _Rule(Decay.COUPLED, _nadam_direction),
    "RAdam": _Rule(Decay.COUPLED, _radam_direction),
    **dict.fromkeys(("Adamax", "Adagrad", "Adadelta", "RMSprop", "ASGD"), _Rule(Decay.COUPLED)),
}
_REGISTERED: dict[type[Optimizer], _Rule] = {}


def _registered(optimizer: Optimizer) -> _Rule | None:
    return next((_REGISTERED[cls] for cls in type(optimizer).__mro__ if cls in _REGISTERED), None)


def _rule(optimizer: Optimizer) -> _Rule | None:
    """What is known of the optimizer: what users registered, else torch's own classes."""
    registered = _registered(optimizer)
    if registered is not None:
        return registered
    cls: Any = type(optimizer)
    return _torch_rule(cls, cls.step)


@functools.lru_cache(maxsize=64)
def _torch_rule(cls: type[Optimizer], step: Callable[..., Any]) -> _Rule | None:
    """The rule of the torch class whose ``step`` this class runs, itself or inherited unchanged."""
    for name, rule in _TORCH.items():
        known = getattr(torch.optim, name, None)
        # torch wraps `step` for its profiler.
        if known is not None and issubclass(cls, known) and inspect.unwrap(step) is inspect.unwrap(known.step):
            return rule
    return None


def _reader(optimizer: Optimizer, parameter: Tensor) -> Direction | None:
    """What reads the parameter's direction from the state, if anything does."""
    rule = _rule(optimizer)
    if rule is None:
        return None
    if _registered(optimizer) is None and (parameter.is_complex() or (rule.whole and isinstance(parameter, DTensor))):
        return None
    return rule.direction
