"""What a pickle would make, found without making it: nothing that it names is imported, called or allocated.

``torch.load(weights_only=True)`` runs no code, but a few bytes can still make it allocate or copy any amount. So a
checkpoint's pickle is read here first, with placeholders for all that it names, and what is out of proportion refused.
"""

from __future__ import annotations

import _compat_pickle
import math
import pickle
import re
from dataclasses import dataclass, field
from typing import Any, BinaryIO, ClassVar, NamedTuple

import torch

from lightning_lowrank.weights.checks import MOST_DIMENSIONS, UnreadableError

# What torch.save calls the types of numbers; newer ones have their own names.
_STORAGES = {
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.ShortStorage": torch.int16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.QInt8Storage": torch.qint8,
    "torch.QUInt8Storage": torch.quint8,
    "torch.QInt32Storage": torch.qint32,
    "torch.QUInt4x2Storage": torch.quint4x2,
    "torch.QUInt2x4Storage": torch.quint2x4,
}
# Of these a byte holds several entries.
_PACKED = {torch.quint4x2: 2, torch.quint2x4: 4}
_QUANTISED, _TYPED = "torch._utils._rebuild_qtensor", "torch._utils._rebuild_tensor_v3"
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", _TYPED, _QUANTISED)
_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
# What makes a collection of its first argument.
_COLLECTIONS = (
    *("collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size"),
    *("builtins.bytearray", "_codecs.encode"),
)
# What makes tensors; torch.save never writes a state for one that is made.
_MADE = ("torch._", "torch.nn.parameter.")
_NEVER = "that torch.save never does"
# What torch.load would call, but torch.save does not write: constructors, and copies to other devices.
_CONSTRUCTOR = re.compile(r"torch\.(\w+\.)?\w*(Tensor|Storage)|torch\._utils\._rebuild_device_tensor_from_\w+")
# Masks and tables of positions are saved as one row that stands for many.
_EXPANDED = 1 << 24
# Of a call only that many arguments are kept: a list of many could be the arguments of many calls.
_KEPT = 8


class Storage(NamedTuple):
    """A stretch of numbers that a pickle refers to.

    Attributes:
        kind: The class that it names.
        key: Its name in the file.
        entries: How many it holds, as the pickle says.
    """

    kind: str
    key: str
    entries: int

    @property
    def nbytes(self) -> int:
        """Its length, as the pickle says."""
        return self.entries * _STORAGES[self.kind].itemsize


class Call:
    """Stands for what a call would have made, with the state that it would have been given."""

    __slots__ = ("args", "built", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args = name, args[:_KEPT]
        self.state: Any = None
        self.built = 0

    def __setstate__(self, state: Any) -> None:
        self.state = state
        self.built += max(_size(state), 1)

    def __call__(self, *args: Any) -> Call:
        """What is called is no class or function that torch knows, so nothing of it is ever loaded."""
        return Call(self.name, args)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries are in the pickle itself, in proportion."""

    def append(self, value: Any) -> None:
        """Entries are in the pickle itself, in proportion."""

    def extend(self, values: Any) -> None:
        """Entries are in the pickle itself, in proportion."""


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


@dataclass
class Global:
    """Stands for a class or function."""

    name: str
    calls: list[Call] = field(repr=False)

    def __call__(self, *args: Any) -> Call:
        """Remember the call."""
        self.calls.append(Call(self.name, args))
        return self.calls[-1]


class InertUnpickler(pickle._Unpickler):
    """Reads one pickle with placeholders.

    It is Python's own unpickler, as that in C allocates as many places as a pickle says it needs.

    Attributes:
        proto: The protocol of the pickle.
        names: All classes and functions that it names.
        calls: All that it calls, in order.
        storages: By key.
    """

    # Without what allocates by a mere number, changes the process, or calls in unusual ways; an object is made by
    # calling its class, like anything else.
    dispatch: ClassVar = {
        code: pickle._Unpickler.dispatch[pickle.REDUCE[0]] if code == pickle.NEWOBJ[0] else read
        for code, read in pickle._Unpickler.dispatch.items()
        if code not in b"".join((pickle.BYTEARRAY8, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEWOBJ_EX))
    }

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream, encoding="utf-8")
        self.proto = 0
        self.names: dict[str, Global] = {}
        self.calls: list[Call] = []
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Global:
        """A placeholder, by the name that Python 3 has for it."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        path = f"{_compat_pickle.IMPORT_MAPPING.get(module, module)}.{name}"
        return self.names.setdefault(path, Global(path, self.calls))

    def persistent_load(self, pid: Any) -> Any:
        """A storage; or the class of a module, which old files refer to in the same way."""
        if pid[0] == "module":
            return pid[1]
        _, kind, key, _, entries, *view = pid
        storage = Storage(kind.name, str(key), entries)
        if pid[0] != "storage" or kind.name not in _STORAGES or type(entries) is not int or entries < 0:
            raise UnreadableError(f"a storage is described in a way {_NEVER}")
        if self.storages.setdefault(storage.key, storage) != storage:
            raise UnreadableError(f"storage {key} is described in two ways")
        if not view or view[0] is None:
            return storage
        _, offset, length = view[0]
        if not 0 <= offset <= offset + length <= entries:
            raise UnreadableError(f"a part of storage {key} reaches beyond it")
        return storage._replace(entries=length)


def check_calls(pickled: InertUnpickler, pickle_bytes: int, file_bytes: int) -> None:
    """Refuse what would need memory or time out of proportion.

    Args:
        pickled: What was read.
        pickle_bytes: The length of the pickle.
        file_bytes: The length of the file.

    Raises:
        UnreadableError: The reason, without the file's name.
    """
    collected = 0
    for call in pickled.calls:  # grows, as calls by calls are added
        collected += call.built
        if call.name == _SUBCLASS:
            _make_subclass(*call.args)
        elif call.name in _TENSORS:
            described_tensor(call, max(file_bytes, _EXPANDED))
            collected += sum(map(_size, call.args[4])) if call.name == _QUANTISED else 0
        elif call.name in _COLLECTIONS:
            if not all(map(_is_plain, call.args)) or call.args[1:] not in ((), ("latin1",), ("latin-1",)):
                raise UnreadableError(f"a {call.name} is made in a way {_NEVER}")
            collected += sum(map(_size, call.args))
        elif _CONSTRUCTOR.fullmatch(call.name):
            raise UnreadableError(f"{call.name} is called in a way {_NEVER}")
        if call.built and call.name.startswith(_MADE):
            raise UnreadableError(f"what {call.name} made is changed in a way {_NEVER}")
    # A list that is written once could otherwise be copied by many short calls.
    if collected > pickle_bytes:
        raise UnreadableError(f"collections are made of one another in a way {_NEVER}")


def _make_subclass(make: Global, kind: Global, args: tuple[Any, ...], *_: Any) -> None:
    """The call within a call that makes a tensor of a subclass."""
    if make.name == _SUBCLASS:
        raise UnreadableError(f"a {kind.name} is made in a way {_NEVER}")
    make(*args)


def _is_plain(arg: Any) -> bool:
    """Whether a collection is made of it at a cost in proportion to what is written."""
    return isinstance(arg, (str, bytes, list, tuple, dict)) or (isinstance(arg, Call) and arg.name == "_codecs.encode")


class Described(NamedTuple):
    """A tensor that a pickle describes, in entries."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def described_tensor(call: Call, limit: int) -> Described:
    """What a call that makes a tensor says of it.

    Args:
        call: Of one of torch's functions that tensors are pickled with.
        limit: Bytes that a tensor may have beyond what is stored of it.

    Raises:
        UnreadableError: If it is larger than what is stored of it.
    """
    if call.name not in _TENSORS:
        raise UnreadableError(f"what {call.name} makes is no tensor")
    storage, offset, shape, stride, *more = call.args
    shape, stride = (tuple(part.args[0] if isinstance(part, Call) else part) for part in (shape, stride))
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise UnreadableError(f"a tensor is described in a way {_NEVER}")
    if len(shape) != len(stride) or len(shape) > MOST_DIMENSIONS:
        raise UnreadableError(f"a tensor is described with {len(shape)} sizes and {len(stride)} strides")
    dtype = named_type(more[2].name) if call.name == _TYPED else _STORAGES[storage.kind]
    entries = math.prod(shape)
    last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
    if entries and last // _PACKED.get(dtype, 1) * dtype.itemsize >= storage.nbytes:
        raise UnreadableError(f"a tensor of shape {shape} reaches beyond its {storage.nbytes} stored bytes")
    if entries * dtype.itemsize > max(storage.nbytes, limit):
        raise UnreadableError(f"a tensor of shape {shape} is described with {storage.nbytes} stored bytes")
    return Described(storage, dtype, offset, shape, stride)


def named_type(name: str) -> torch.dtype:
    """The type of numbers that torch calls ``torch.<name>``.

    Raises:
        UnreadableError: If there is none.
    """
    # Not by getattr, which imports what torch loads lazily.
    dtype = vars(torch).get(name.removeprefix("torch."))
    if not isinstance(dtype, torch.dtype):
        raise UnreadableError(f"entries are of type {name}, which this torch does not know")
    return dtype
