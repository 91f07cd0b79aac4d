"""Everything that this package raises on purpose.

::

    DistBNError
    ├── ConfigurationError (ValueError)     an argument outside its allowed values
    ├── InputError (ValueError)             a batch that a layer cannot normalise
    ├── StateDictError (RuntimeError)       a checkpoint with another number of ranks
    ├── RegistryError (ValueError)          a pair of classes that cannot be registered
    └── ConversionError
        ├── UnsupportedModuleError (TypeError)   a module that must not be converted
        ├── AlreadyConvertedError (ValueError)   a layer that has other virtual ranks
        └── NothingToConvertError (ValueError)   no layer matched

Each class also inherits the built-in exception that a PyTorch user would catch.
"""

from __future__ import annotations

__all__ = [
    "AlreadyConvertedError",
    "ConfigurationError",
    "ConversionError",
    "DistBNError",
    "InputError",
    "NothingToConvertError",
    "RegistryError",
    "StateDictError",
    "UnsupportedModuleError",
]


class DistBNError(Exception):
    """Base class of every error that distbn_convert raises on purpose."""


class ConfigurationError(DistBNError, ValueError):
    """An argument has a value that is not allowed."""


class InputError(DistBNError, ValueError):
    """A batch has a shape that the layer cannot normalise."""


class StateDictError(DistBNError, RuntimeError):
    """A state dict holds statistics of another number of ranks."""


class RegistryError(DistBNError, ValueError):
    """A pair of classes cannot be registered."""


class ConversionError(DistBNError):
    """A model cannot be converted or reverted; nothing was changed."""


class UnsupportedModuleError(ConversionError, TypeError):
    """The model holds a module that would lose behaviour if it were converted."""


class AlreadyConvertedError(ConversionError, ValueError):
    """A layer already has virtual ranks, with other settings than those asked for."""


class NothingToConvertError(ConversionError, ValueError):
    """No layer of the model matched."""
