"""An unpickler that takes no more memory than its file is large, whatever that claims."""

from __future__ import annotations

import pickle
import struct
from typing import Any, ClassVar

__all__ = ["BoundedUnpickler"]

# That in C keeps its memo in an array: one flipped bit in an index takes 18 GB.
_PythonUnpickler: Any = pickle._Unpickler


class BoundedUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Python's own unpickler, written in Python, whose memo is a dictionary."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PythonUnpickler.dispatch)

    def load_bytearray8(self) -> None:
        """Read the bytes before memory is made for them."""
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(size)
        if len(data) < size:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(data))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8
