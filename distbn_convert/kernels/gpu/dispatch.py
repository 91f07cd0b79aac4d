"""Launch what Triton has compiled without its dispatch, which takes longer than small kernels do.

The dispatch looks at every argument of every call for what kernels are specialised for: types,
numbers that are 1 or multiples of 16, aligned pointers, options of the compiler. A plan fixes all
but a few of those, and :class:`Kernel` looks at these few. Triton's hooks around launches, which
profilers set, are called; what else is set after a kernel's first launch (its hooks before a run,
``debug``, other instrumentation) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

__all__ = ["Kernel"]

# Triton specialises for pointers that are multiples of it.
_ALIGNMENT = 16


class Kernel:
    """A kernel with all of a launch that stays the same from call to call.

    Args:
        function: what ``triton.jit`` made.
        grid: programs along one to three axes.
        options: the kernel's last parameters and the compiler's options, by name.
    """

    def __init__(self, function: Any, grid: tuple[int, ...], options: dict[str, Any]) -> None:
        self.function, self.grid, self.options = function, grid, options
        self._last = tuple(options[name] for name in function.arg_names if name in options)
        self._launches: dict[tuple[Any, ...], Callable[..., None]] = {}

    def __call__(self, device: int, *arguments: Any) -> None:
        """Launch on the current stream of the current device, which has the index ``device``.

        ``arguments`` are the kernel's first parameters: tensors, numbers, None, tuples of those.
        """
        key: list[Any] = [device]
        values = _examine(arguments, key)
        launch = self._launches.get(tuple(key))
        if launch is not None:
            launch(*values, *self._last)
            return
        compiled = self.function[self.grid](*arguments, **self.options)
        if hasattr(compiled, "result"):  # is being compiled, in Triton's AsyncCompileMode
            compiled = compiled.result()
        if compiled is not None:  # else it was interpreted
            self._launches[tuple(key)] = compiled[(*self.grid, 1, 1)[:3]]


def _examine(arguments: tuple[Any, ...], key: list[Any]) -> list[Any]:
    """Return arguments as a launch takes them; append to ``key`` what kernels are compiled for."""
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            key.append(argument.dtype)
            if pointer % _ALIGNMENT:
                key.append("unaligned")
            values.append(pointer)
            continue
        if isinstance(argument, tuple):
            values.append(tuple(_examine(argument, key)))
            continue
        # Integers are looked at for their values, floats are not.
        key.append(float if isinstance(argument, float) else argument)
        values.append(argument)
    return values
