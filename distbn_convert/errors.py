"""Everything that this package raises on purpose.

::

    DistBNError
    ├── ConfigurationError (ValueError)     an argument outside its allowed values
    ├── InputError (ValueError)             a batch that a layer cannot normalise
    ├── StateDictError (RuntimeError)       a checkpoint with another number of ranks
    ├── RegistryError (ValueError)          a pair of classes that cannot be registered
    ├── ConversionError
    │   ├── UnsupportedModuleError (TypeError)   a module that must not be converted
    │   ├── AlreadyConvertedError (ValueError)   a layer that has other virtual ranks
    │   └── NothingToConvertError (ValueError)   no layer matched
    └── CheckpointError                                                     exit status
        ├── NothingToDoError (ValueError)   no BatchNorm, or already as wanted        3
        ├── RefusedError (ValueError)       unsafe, or of a kind that is not handled  4
        ├── ReadError (ValueError)          damaged, truncated, not a checkpoint      5
        ├── OutputExistsError (FileExistsError)   the output, or it is the source     6
        ├── FileAccessError (OSError)       not found, permission, no space           7
        └── VerificationError (RuntimeError)  not what was meant, or two files differ  8

Each class also inherits the built-in exception that a PyTorch user would catch.
"""

from __future__ import annotations

__all__ = [
    "AlreadyConvertedError",
    "CheckpointError",
    "ConfigurationError",
    "ConversionError",
    "DistBNError",
    "FileAccessError",
    "InputError",
    "NothingToConvertError",
    "NothingToDoError",
    "OutputExistsError",
    "ReadError",
    "RefusedError",
    "RegistryError",
    "StateDictError",
    "UnsupportedModuleError",
    "VerificationError",
]


class DistBNError(Exception):
    """Base class of every error that distbn_convert raises on purpose."""


class ConfigurationError(DistBNError, ValueError):
    """An argument has a value that is not allowed."""


class InputError(DistBNError, ValueError):
    """A batch has a shape, dtype or device that the layer cannot normalise."""


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


class CheckpointError(DistBNError):
    """A checkpoint cannot be handled; no input was changed and no output is left half-written.

    Attributes:
        exit_code: the status with which the command line ends.
    """

    exit_code = 1


class NothingToDoError(CheckpointError, ValueError):
    """The file holds no BatchNorm statistics, or they already have the wanted form."""

    exit_code = 3


class RefusedError(CheckpointError, ValueError):
    """The file holds what is unsafe to load, or is of a kind that is not handled."""

    exit_code = 4


class ReadError(CheckpointError, ValueError):
    """The file is damaged, truncated or not a checkpoint."""

    exit_code = 5


class OutputExistsError(CheckpointError, FileExistsError):
    """The output exists, or is the source itself."""

    exit_code = 6


class FileAccessError(CheckpointError, OSError):
    """A file cannot be read or written: not found, permission, space."""

    exit_code = 7


class VerificationError(CheckpointError, RuntimeError):
    """What was written is not what was meant and was removed, or two checkpoints differ."""

    exit_code = 8
