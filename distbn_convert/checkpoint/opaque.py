"""Pickles read without importing or calling anything that they name.

Unknown classes and functions become inert stand-ins that remember what the pickle asked for, and
are written again as they came. So a checkpoint that holds any Python objects can be edited without
the code that made it, and without trust: a payload stays a payload, and is listed.
"""

from __future__ import annotations

import _compat_pickle
import collections
import copyreg
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import IO, Any, ClassVar

import torch

from .unpickler import BoundedUnpickler

__all__ = ["InertGlobal", "InertObject", "known_global", "opaque_pickle", "scan_globals"]


class InertGlobal(type):
    """The type of the stand-ins for classes and functions that a pickle names."""

    global_name: tuple[str, str]

    def __call__(cls, *args: Any) -> Any:
        """Stand for the result of a call."""
        return _called(cls, args)

    def __repr__(cls) -> str:
        return f"<inert {'.'.join(cls.global_name)}>"


class InertObject(metaclass=InertGlobal):
    """A stand-in for an object that a pickle would have made.

    Attributes:
        items: the items of a dictionary, empty for other objects.
    """

    global_name: ClassVar[tuple[str, str]] = ("", "")

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    elements: list[Any]
    items: dict[Any, Any]
    states: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> InertObject:
        """Take the arguments of the constructor, and make nothing of them."""
        self = object.__new__(cls)
        self.function = None
        self.args, self.kwargs = args, kwargs
        self.elements, self.items, self.states = [], {}, []
        return self

    def __call__(self, *args: Any) -> InertObject:
        """Stand for the result of a call."""
        return _called(self, args)

    def __setstate__(self, state: Any) -> None:
        if self.states:
            raise pickle.UnpicklingError("an object is given its state twice")
        self.states.append(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, element: Any) -> None:
        """Take an element of a list."""
        self.elements.append(element)

    def reduced(self) -> tuple[Any, ...]:
        """Return what the pickler needs to write it as it came."""
        function, args = self.function, self.args
        if function is None and self.kwargs:
            function, args = copyreg.__newobj_ex__, (type(self), args, self.kwargs)  # type: ignore[attr-defined]
        elif function is None:
            function, args = copyreg.__newobj__, (type(self), *args)  # type: ignore[attr-defined]
        state = self.states[0] if self.states else None
        return function, args, state, iter(self.elements), iter(self.items.items())


class _UntypedStorage(InertObject):
    """A stand-in for torch's class, of which torch asks how large its elements are."""

    global_name = ("torch.storage", "UntypedStorage")
    dtype = torch.uint8


def _called(function: Any, args: tuple[Any, ...]) -> InertObject:
    result = InertObject.__new__(InertObject, *args)
    result.function = function
    return result


class _Known:
    """A function that a pickle may call, and cannot alter as it could torch's own.

    A pickle may also hold it, as an argument for what rebuilds a tensor of a subclass or with
    attributes; so it can be written, by its name.
    """

    __slots__ = ("_function", "global_name")
    _function: Callable[..., Any]
    global_name: tuple[str, str]

    def __init__(self, module: str, name: str, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "global_name", (module, name))
        object.__setattr__(self, "_function", function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"a state for {'.'.join(self.global_name)}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Known) and self.global_name == other.global_name

    def __hash__(self) -> int:
        return hash(self.global_name)


def _encode(text: str, encoding: str) -> bytes:
    """Rebuild bytes from a pickle of protocol 2, which has no other spelling for them."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_REBUILDERS = ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
_FUNCTIONS = [
    _Known("_codecs", "encode", _encode),
    *(_Known("torch._utils", name, getattr(torch._utils, name)) for name in _REBUILDERS),
]
_KNOWN: dict[tuple[str, str], Any] = {function.global_name: function for function in _FUNCTIONS}
_KNOWN[_UntypedStorage.global_name] = _UntypedStorage


def known_global(module: str, name: str) -> Any:
    """Return the object if rebuilding tensors and state dicts needs it, None otherwise."""
    if (module, name) == ("collections", "OrderedDict"):
        return collections.OrderedDict
    if module == "torch":
        value = getattr(torch, name, None)
        if isinstance(value, torch.dtype) or value in (torch.Size, torch.device):
            return value
    return _KNOWN.get((module, name))


class _Names:
    """The stand-ins of one file, one for each name."""

    def __init__(self) -> None:
        self.inert: dict[tuple[str, str], InertGlobal] = {}

    def __getitem__(self, key: tuple[str, str]) -> InertGlobal:
        if key not in self.inert:
            self.inert[key] = InertGlobal("Inert", (InertObject,), {"global_name": key})
        return self.inert[key]

    def listed(self) -> list[str]:
        """Return the names, ``"posix.system"``; those of Python 2 in today's spelling."""
        return [".".join(_todays(*key)) for key in self.inert]


def _todays(module: str, name: str) -> tuple[str, str]:
    """Return the name that Python 3 gives to what a pickle of protocol 2 calls as Python 2 did."""
    renamed = _compat_pickle.NAME_MAPPING.get((module, name))
    return renamed or (_compat_pickle.IMPORT_MAPPING.get(module, module), name)


# The pickler in Python, since that in C looks up what it names; typeshed hides its methods.
_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):  # type: ignore[misc]
    """Writes stand-ins as what they stand for, without looking the names up."""

    def reducer_override(self, obj: Any) -> Any:
        return obj.reduced() if isinstance(obj, InertObject) else NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if not isinstance(obj, (InertGlobal, _Known)):
            super().save_global(obj, name)
            return
        module, name = obj.global_name
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    # The class of a stand-in reaches save_global through this table, not by its metaclass.
    dispatch: ClassVar[dict[type, Any]] = {
        **_PythonPickler.dispatch,
        InertGlobal: save_global,
        _Known: save_global,
    }


def opaque_pickle() -> Any:
    """Return what ``torch.load`` and ``torch.save`` take as ``pickle_module``.

    Its ``globals()`` lists the names that were replaced by stand-ins, ``"posix.system"``.
    """
    names = _Names()

    class Unpickler(BoundedUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            known = known_global(module, name)
            return names[module, name] if known is None else known

    def load(file: IO[bytes], **kwargs: Any) -> Any:
        return Unpickler(file, **kwargs).load()

    return SimpleNamespace(
        __name__="opaque",
        Unpickler=Unpickler,
        Pickler=_Pickler,
        load=load,
        globals=names.listed,
    )


def scan_globals(file: IO[bytes], pickles: int = 1) -> list[str]:
    """List the names that the next pickles of a file ask for; none is imported.

    Args:
        file: binary, at the start of a pickle.
        pickles: how many to read. Default: 1

    Returns:
        list of str: ``["collections.OrderedDict", "posix.system"]``, in the order of appearance.

    Raises:
        Exception: whatever the unpickler makes of a damaged file.
    """
    names = _Names()

    class Scanner(BoundedUnpickler):
        def find_class(self, module: str, name: str) -> Any:
            return names[module, name]

        def persistent_load(self, pid: Any) -> Any:
            return InertObject.__new__(InertObject, pid)

    for _ in range(pickles):
        Scanner(file, encoding="utf-8").load()
    return names.listed()
