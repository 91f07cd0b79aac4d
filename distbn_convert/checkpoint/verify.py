"""Whether a checkpoint is sound, and whether two hold the same."""

from __future__ import annotations

from ..errors import ConfigurationError
from .comparison import Comparison
from .intact import check_checksums
from .job import file_info
from .keywords import ReadingKeywords, Unpack, shows_options
from .options import Options
from .places import StrPath, as_path
from .report import VerifyReport
from .side import Side
from .stores import Store, open_store
from .torchstore import TreeStore

__all__ = ["verify_checkpoint"]


@shows_options(ReadingKeywords)
def verify_checkpoint(
    src: StrPath,
    against: StrPath | None = None,
    tolerance: float = 0.0,
    **options: Unpack[ReadingKeywords],
) -> VerifyReport:
    """Check that a checkpoint is sound, or that two hold the same.

    Where a BatchNorm is plain in one file and virtual in the other, the mean of the ranks is
    compared. All other tensors must be equal bit for bit, and so must all else that both can hold:
    objects in files of torch and of ``torch.distributed.checkpoint``, and files of the same name
    beside the weights in folders. A warning names what only one of them can hold.

    Args:
        src: **path** of a checkpoint.
        against: **path** of another, of any format. Default: None, check ``src`` alone
        tolerance: **float**, the largest absolute difference of statistics that counts as equal.
            Default: 0
        **options: see :class:`Options`; those of writing have no effect. ``state`` takes the
            sub-tree of a file that has it, and is compared with all of a file that has no
            sub-trees; files beside the weights are then left alone.

    Returns:
        VerifyReport: what was checked.

    Raises:
        ConfigurationError: an argument is outside its allowed values.
        VerificationError: the files differ; the message names the first places.
        NothingToDoError: there is nothing at ``state``.
        RefusedError: a file has what ``strict`` refuses.
        ReadError: the file is damaged.
        CheckpointError: it cannot be read.

    Example::

        >>> verify_checkpoint("virtual.pth", against="plain.pth").largest_difference
        0.0
    """
    if not tolerance >= 0:
        raise ConfigurationError(f"tolerance must be 0 or more, but got {tolerance!r}.")
    chosen = Options(**options)
    path = as_path(src)
    checksums = check_checksums(path)
    stores = [open_store(path, chosen.reading)]
    if against is not None:
        second = as_path(against)
        check_checksums(second)
        stores.append(open_store(second, chosen.reading))
        _spell_out(*stores)
        if chosen.state is None and all(store.concerns for store in stores):
            for store in stores:  # two folders, whose files beside the weights are compared
                store.concerns.clear()
    side = Side(path, stores[0], chosen.selection, chosen.strict)
    report = VerifyReport(file_info(path, side.store.format, chosen.sha256), checksums=checksums)
    report.groups = len(side.groups)
    warnings = side.warnings
    if against is None:
        if chosen.state is not None and side.state is None:
            raise side.lacks(chosen.state)
        if not checksums:
            warnings.append(
                f"{src} has no checksums ({side.store.format}); its structure was checked."
            )
    else:
        other = Side(second, stores[1], chosen.selection, chosen.strict)
        if chosen.state is not None and side.state is other.state is None:
            raise side.lacks(chosen.state)
        report.against = file_info(second, other.store.format, chosen.sha256)
        comparison = Comparison(side, other, tolerance, files=chosen.state is None)
        comparison.raise_differences()
        report.largest_difference = comparison.largest
        warnings += [f"{against}: {it}" for it in other.warnings if it not in warnings]
        warnings += comparison.warnings()
    report.warnings = tuple(warnings)
    return report


def _spell_out(first: Store, second: Store) -> None:
    """Have a file of torch name its tensors as the other format does."""
    for store, other in ((first, second), (second, first)):
        if isinstance(store, TreeStore) and not isinstance(other, TreeStore):
            store.spell_out(lists=other.format == "dcp")
