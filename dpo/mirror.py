"""A second copy of a run on another disk, for machines that are taken away with theirs: a notebook's, a spot one's.

It holds what the run's folder holds under the same names, checkpoints and adapter included, and no tracker's files. A
run's results do not depend on it, and a disk that fails costs the run nothing but the copy.
"""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import final

from dpo import checkpoint
from dpo.errors import CheckpointError, ConfigError

log = logging.getLogger("dpo")

CHECKPOINTS, ADAPTER = "checkpoints", "adapter"


@final
class Mirror:
    """Keeps a copy of one run's folder, and fills an empty folder from it."""

    def __init__(self, folder: Path, root: Path, keep: int, last: Sequence[str]) -> None:
        """Copy `folder` to the same path below `root`, so that one mirror serves many runs.

        Args:
            folder: of the run, as the settings name it.
            root: of all copies; it must be there, so that a drive that is not mounted is noticed.
            keep: checkpoints to keep there.
            last: files at the top of the folder that say how far it is: copied after all they speak of, in this order.

        Raises:
            ConfigError: `root` is no folder, or the copy would be the folder itself.
        """
        self._folder, self._keep, self._last = folder, keep, tuple(last)
        self.place = root.joinpath(*(part for part in folder.parts if part not in (folder.anchor, "..")))
        """Where the copy is."""
        if not root.is_dir():
            raise ConfigError(
                f"output.mirror: got {root}, which is no folder, expected one that is there. Make it, mount its drive, "
                "or leave output.mirror out."
            )
        if self.place.resolve() == folder.resolve():
            raise ConfigError(f"output.mirror: got {root}, which copies {folder} onto itself. Give another folder.")

    def update(self) -> None:
        """Copy what there is; a disk that refuses is told of, and the next call tries again."""
        try:
            self._copy(self._folder, self.place)
        except (OSError, CheckpointError) as error:
            log.warning("output.mirror: %s The run goes on; the copy is tried again after the next save.", error)

    def restore(self) -> bool:
        """Fill the run's folder, which holds nothing, from the copy; return whether there is one.

        Raises:
            CheckpointError: all checkpoints of the copy are damaged, or the run's own disk refuses.
            OSError: a file cannot be read or written.
        """
        if not any((self.place / name).is_file() for name in self._last):
            return False
        self._copy(self.place, self._folder)
        log.info("%s holds no run: going on from its copy in %s", self._folder, self.place)
        return True

    def _copy(self, source: Path, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        names = sorted(one.name for one in source.iterdir() if one.is_file() and not one.name.startswith("."))
        for name in (one for one in names if one not in self._last):  # the ledger before the checkpoint it belongs to
            _copy_whole(source / name, target / name)
        found = checkpoint.newest(source / CHECKPOINTS)
        if found is not None:
            for skipped in found.skipped:
                log.warning("skipped a damaged checkpoint: %s", skipped.reason)
            checkpoint.copy(found.checkpoint.path, target / CHECKPOINTS, self._keep)
        if (source / ADAPTER).is_dir():
            (target / ADAPTER).mkdir(exist_ok=True)
            for file in sorted((source / ADAPTER).iterdir()):
                _copy_whole(file, target / ADAPTER / file.name)
        for name in (one for one in self._last if one in names):
            _copy_whole(source / name, target / name)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a file that is afterwards the old one or the new one in full."""
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
