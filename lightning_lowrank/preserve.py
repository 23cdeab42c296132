"""Run a module's code and leave no trace: everything that it changes is put back.

A checkpoint does not hold what a training step changes besides the parameters: metric states, lists of outputs, plain
counters, random number generators inside transforms. So this walks the objects themselves, and puts values back *into*
them: whoever holds a list, a buffer or a generator goes on holding it.
"""

from __future__ import annotations

import functools
import math
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_lowrank._compat import is_machinery

# What a dataset, sampler or dataloader holds is data; only small tensors there can be a state worth a copy.
_LARGEST_DATA_COPY = 2**20  # bytes
# The items of longer containers are data as well: order and membership are put back, the items are not looked into.
_LONGEST_WALK = 10_000

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_NOT_STATE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType, Enum)
_DATA = (DataLoader, Dataset, Sampler)
# Objects of these packages run threads, hold handles or describe hardware. torch's that matter are named above.
_FOREIGN = {"torch", "numpy", "lightning", "lightning_fabric", "pytorch_lightning", "wandb", "mlflow", "tensorboard"}
# Parameters, submodules and hooks are a module's structure.
_STRUCTURE = frozenset(vars(nn.Module())) - {"training", "_buffers", "_non_persistent_buffers_set"}

_Action = Callable[[], object]


@contextmanager
def preserved(module: nn.Module, *extra_objects: object) -> Iterator[Snapshot]:
    """On leaving, also by an exception, put back what code may have changed in the module and in other objects.

    Put back are the global random number generators (Python, NumPy, torch on every device in use), and of every
    submodule the training flag, buffers, metric states, plain attributes, and the tensors, arrays, builtin containers,
    plain Python objects and generators found there, each in place. Parameters are not (see :class:`FixedParameters`),
    nor are Trainers, callbacks, loggers, optimizers and objects of other libraries, which stay by reference.

    Args:
        module: The module, with all that its attributes lead to.
        extra_objects: A dataloader, a dataset and the like; as for the module, but tensors and arrays above 1 MiB are
            taken for data and not copied.

    Yields:
        The state on entering.

    Example:
        >>> module = torch.nn.BatchNorm1d(2)
        >>> module.seen = []
        >>> with preserved(module):
        ...     module.seen.append(module(torch.randn(4, 2)))
        >>> module.running_mean, module.seen
        (tensor([0., 0.]), [])
    """
    generators = _global_generators()
    snapshot = Snapshot(module, extra_objects)
    try:
        yield snapshot
    finally:
        snapshot.restore()
        for put_back in generators:
            put_back()


class Snapshot:
    """The state of a module and of other objects at one moment.

    Args:
        module: The module.
        extra_objects: See :func:`preserved`.

    Attributes:
        parameters: Every parameter met on the way, also of modules that are hidden in plain attributes.
    """

    def __init__(self, module: nn.Module, extra_objects: Iterable[object] = ()) -> None:
        self.parameters: list[nn.Parameter] = []
        self._met: dict[int, object] = {}
        self._generators: list[_Action] = []
        self._actions: list[_Action] = []
        self._walk(module, math.inf)
        self._of_module = len(self._actions)
        for extra in extra_objects:
            self._walk(extra, _LARGEST_DATA_COPY)

    def rewind(self) -> None:
        """Put the module back but for its generators, so that code runs again from the same state, with new draws."""
        for put_back in self._actions[: self._of_module]:
            put_back()

    def restore(self) -> None:
        """Put everything back."""
        for put_back in (*self._actions, *self._generators):
            put_back()

    def _walk(self, root: object, largest_copy: float) -> None:
        todo = [(root, largest_copy)]
        while todo:
            value, largest = todo.pop()
            if isinstance(value, _ATOMS) or id(value) in self._met:
                continue
            # Holding on to the object keeps its id its own.
            self._met[id(value)] = value
            if isinstance(value, _DATA):
                largest = min(largest, _LARGEST_DATA_COPY)
            todo += [(item, largest) for item in self._record(value, largest)]

    def _record(self, value: Any, largest_copy: float) -> Iterable[object]:
        """Note how to put one object back, and return the objects that it holds."""
        if isinstance(value, nn.Parameter):
            self.parameters.append(value)
        elif isinstance(value, (Tensor, np.ndarray)):
            if (
                value.nbytes if isinstance(value, np.ndarray) else value.numel() * value.element_size()
            ) <= largest_copy:
                self._actions += _array_action(value)
        elif (generator := _generator_action(value)) is not None:
            self._generators.append(generator)
        elif isinstance(value, (list, dict, set, deque)):
            self._actions.append(_container_action(value))
            if len(value) <= _LONGEST_WALK:
                return list(value.values()) if isinstance(value, dict) else list(value)
        elif isinstance(value, (tuple, frozenset)):
            return value if len(value) <= _LONGEST_WALK else ()
        elif isinstance(value, types.MethodType):
            return (value.__self__,)
        elif isinstance(value, functools.partial):
            return (value.func, *value.args, *value.keywords.values())
        elif isinstance(value, nn.Module):
            state = {name: held for name, held in vars(value).items() if name not in _STRUCTURE}
            self._actions.append(functools.partial(_restore_attributes, value, state))
            # Buffers by their own iterator too: a ScriptModule does not keep them in an attribute.
            own = (*value.parameters(recurse=False), *value.buffers(recurse=False))
            return (*state.values(), *own, *value.children())
        elif _is_plain_object(value):
            state = dict(vars(value))
            self._actions.append(functools.partial(_restore_attributes, value, state))
            return state.values()
        return ()


class FixedParameters(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, code that would change one of the parameters in place raises, before it has changed anything.

    Watching the operators instead of comparing values needs no copy of the model and sees writes through ``.data``,
    which no version counter does. Replacing ``parameter.data`` is no operator: that is undone, and
    raises, at the end.

    Args:
        parameters: Names and parameters.

    Example:
        >>> target = torch.nn.Parameter(torch.ones(2))
        >>> with FixedParameters({"target": target}):
        ...     target.data.mul_(0.9)
        Traceback (most recent call last):
        ValueError: training_step changes the parameter 'target', so it has no gradient at fixed weights...
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._data = [(name, parameter, parameter.data) for name, parameter in parameters.items()]
        self._names = {_address(parameter): name for name, parameter in parameters.items() if parameter.numel()}

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            self._refuse_writes(func._schema.arguments, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _refuse_writes(self, arguments: Iterable[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for index, argument in enumerate(arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            written = args[index] if index < len(args) else kwargs.get(argument.name)
            for leaf in tree_leaves(written):
                if isinstance(leaf, Tensor) and (name := self._names.get(_address(leaf))) is not None:
                    raise _changed(name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        replaced = [entry for entry in self._data if entry[1].data_ptr() != entry[2].data_ptr()]
        for _, parameter, data in replaced:
            parameter.data = data
        if replaced and error is None:
            raise _changed(replaced[0][0])


def _changed(name: str) -> ValueError:
    return ValueError(
        f"training_step changes the parameter {name!r}, so it has no gradient at fixed weights. Update an average or a"
        " target network in on_train_batch_end instead."
    )


def _address(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Where a tensor's storage is, the same for all its views; None where it has none."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return None
    return tensor.device, tensor.untyped_storage().data_ptr()


def _array_action(value: Tensor | np.ndarray[Any, Any]) -> list[_Action]:
    """How to put a tensor's or an array's values back in place; nothing where they can't have been changed in place."""
    if isinstance(value, np.ndarray):
        kept = value.copy()
        return [functools.partial(np.copyto, value, kept)] if value.flags.writeable else []
    if isinstance(value, UninitializedBuffer) or any(
        size > 1 and stride == 0 for size, stride in zip(value.shape, _strides(value), strict=False)
    ):
        return []
    # Through `data` neither autograd nor a version counter notices; it also works for inference tensors.
    data, saved = value.data, value.detach().clone()

    def put_back() -> None:
        if value.data_ptr() != data.data_ptr() or value.shape != data.shape:
            value.data = data
        value.data.copy_(saved)

    def put_back_sparse() -> None:
        value.data = saved.clone()

    return [put_back if value.layout is torch.strided else put_back_sparse]


def _strides(tensor: Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()


def _container_action(value: Any) -> _Action:
    """How to put a builtin container's items back in place, whatever a subclass does in its own methods."""
    if isinstance(value, list):
        return functools.partial(list.__setitem__, value, slice(None), list(value))
    kind: Any = next(kind for kind in (OrderedDict, dict, set, deque) if isinstance(value, kind))
    items = list(value.items()) if isinstance(value, dict) else list(value)
    fill = deque.extend if kind is deque else kind.update

    def put_back() -> None:
        kind.clear(value)
        fill(value, items)

    return put_back


def _generator_action(value: Any) -> _Action | None:
    """How to put a random number generator back; None for anything else."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, (np.random.Generator, np.random.BitGenerator)):
        bits = value.bit_generator if isinstance(value, np.random.Generator) else value
        return functools.partial(setattr, bits, "state", bits.state)
    return None


def _global_generators() -> list[_Action]:
    """How to put the global generators back to where they are now."""
    actions: list[_Action] = [
        functools.partial(random.setstate, random.getstate()),
        functools.partial(np.random.set_state, np.random.get_state()),  # noqa: NPY002
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
    ]
    # Asking a device that nothing runs on would start it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        actions.append(functools.partial(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()))
    if torch.backends.mps.is_available():
        actions.append(functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return actions


def _is_plain_object(value: Any) -> bool:
    """Whether an object's attributes are a state that plain Python code keeps there."""
    kind = type(value)  # not isinstance: a weak proxy says that it is what it points to
    if issubclass(kind, (*_DATA, Namespace, types.SimpleNamespace)):
        return True
    if issubclass(kind, _NOT_STATE) or is_machinery(kind) or not hasattr(kind, "__dict__"):
        return False
    root = kind.__module__.partition(".")[0]
    has_attributes = getattr(kind, "__dictoffset__", 0) != 0
    return has_attributes and root not in _FOREIGN and root not in sys.stdlib_module_names


def _restore_attributes(owner: Any, state: Mapping[str, object]) -> None:
    attributes = vars(owner)
    kept = _STRUCTURE if isinstance(owner, nn.Module) else ()
    for name in [name for name in attributes if name not in state and name not in kept]:
        del attributes[name]
    attributes.update(state)
