# Copyright (c) the torchrl_dvla authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Which checkpoint of another project a policy came from, through any number of trainings."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Origin", "fingerprint_of_file"]

#: Parts of a file that are read, and their bytes: a megabyte, whatever its size.
_NUM_PARTS, _PART_BYTES = 256, 4096


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another project that a policy was first loaded from.

    Args:
        path (str): its folder.
        fingerprint (str): of its file of weights, see :func:`fingerprint_of_file`.
        stated (Mapping): what was stated about it, see
            :class:`~torchrl_dvla.modules.formats.Stated`.
    """

    path: str
    fingerprint: str
    stated: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Path, stated: Mapping[str, Any] | None = None) -> Origin:
        """That of the folder of a file of weights."""
        folder = str(weights.parent.absolute())
        return cls(folder, fingerprint_of_file(weights), dict(stated or {}))

    def check_same(self, weights: Path) -> None:
        """Require a file of weights to be that of this checkpoint.

        Raises:
            ValueError: if it is another one.
        """
        if (found := fingerprint_of_file(weights)) != self.fingerprint:
            raise ValueError(
                f"the policy must be exported to the checkpoint that it came from, {self.path!r} "
                f"with fingerprint {self.fingerprint}, got {str(weights)!r} with {found}. The "
                "weights there are others: name by --base where the checkpoint is now."
            )


def fingerprint_of_file(path: str | os.PathLike[str]) -> str:
    """Checksum of the size of a file and of up to 256 parts of it, evenly spread.

    It tells checkpoints apart, not one damaged byte from none: gigabytes are not read for it.

    Examples:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     fingerprint_of_file(file.name)
        '00000000-0'
    """
    checksum = 0
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        step = max(_PART_BYTES, size // _NUM_PARTS)
        for start in range(0, size, step):
            file.seek(start)
            checksum = zlib.crc32(file.read(_PART_BYTES), checksum)
    return f"{checksum:08x}-{size}"
