"""Interpreted kernels whose programs run in threads, as many at once as a device has room for.

Triton's interpreter runs a launch's programs one after another, so that one which waits for a
later one would wait forever. Here they start in the order of their ``program_id``, or in another,
and ``room`` of them run at once, interleaved at random by Python; the memory of all threads is
the same at all times, as a GPU's is not: that is what tests of the machine code and of a device
are for.
"""

from __future__ import annotations

import functools
import inspect
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from triton.runtime import interpreter

_place = threading.local()
# Of this launch, the first first.
_errors: list[BaseException] = []
# Triton walks through a function's globals, to which it adds when it first sees another.
_lock = threading.RLock()


class _Builder(type(interpreter.interpreter_builder)):
    """Each thread is a program of its own."""

    @property
    def grid_idx(self) -> Any:
        return getattr(_place, "index", None)

    @grid_idx.setter
    def grid_idx(self, index: Any) -> None:
        _place.index = index

    def create_atomic_rmw(self, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        if not value.data.any():  # adds nothing: a program that waits lets others work
            time.sleep(1e-3)
            if _errors:
                raise RuntimeError("another program failed, which this one may wait for")
        return super().create_atomic_rmw(operation, pointer, value, *rest)


class _Scope:
    """Runs the programs that a launch has gathered, then does what Triton does after them."""

    def __init__(self, scope: Any, run: Callable[[], None]) -> None:
        self.scope, self.run = scope, run

    def restore(self) -> None:
        try:
            self.run()
        finally:
            self.scope.restore()


def gathering(fn: Callable[..., None]) -> Any:
    """A stand-in for a kernel, which remembers its programs instead of running them."""

    @functools.wraps(fn)
    def remember(**arguments: Any) -> None:
        remember.programs.append((_place.index, functools.partial(fn, **arguments)))

    remember.programs = []
    remember.__signature__ = inspect.signature(fn)
    return remember


def run_all(programs: list[Any], room: int, shuffle: bool) -> None:
    if shuffle:
        random.shuffle(programs)

    def start(index: Any, program: Callable[[], None]) -> None:
        _place.index = index
        try:
            program()
        except BaseException as error:
            _errors.append(error)

    _errors.clear()
    with ThreadPoolExecutor(room) as pool:
        for program in programs:
            pool.submit(start, *program)
    if _errors:
        raise _errors[0]


@contextmanager
def concurrent_programs(room: int, shuffle: bool = False) -> Iterator[None]:
    """Run the programs of each launch ``room`` at a time; in any order if shuffled.

    A launch whose programs wait for each other forever never returns: run this in a process that
    is stopped after some time.
    """
    executor, patch = interpreter.GridExecutor, interpreter._patch_lang
    function, rewrite = interpreter.InterpretedFunction, interpreter.InterpretedFunction.rewrite
    builder, interval = interpreter.interpreter_builder, sys.getswitchinterval()
    kind = type(builder)

    class Executor(executor):
        def __init__(self, fn: Any, *arguments: Any) -> None:
            super().__init__(fn, *arguments)
            self.fn = gathering(fn)

    def patched(fn: Any) -> Any:
        if not hasattr(fn, "programs"):
            with _lock:
                return patch(fn)
        return _Scope(patch(fn.__wrapped__), lambda: run_all(fn.programs, room, shuffle))

    def rewritten(self: Any) -> Any:
        with _lock:
            return rewrite(self)

    interpreter.GridExecutor, interpreter._patch_lang = Executor, patched
    function.rewrite = rewritten
    builder.__dict__.pop("grid_idx", None)
    builder.__class__ = _Builder
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        builder.__class__ = kind
        interpreter.GridExecutor, interpreter._patch_lang = executor, patch
        function.rewrite = rewrite
