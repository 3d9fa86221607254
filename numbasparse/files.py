"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path


def write_whole(path: str | os.PathLike[str], blob: bytes) -> None:
    """Write ``blob`` beside ``path`` and rename it; on any failure ``path`` is as it was.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    path = Path(path)
    # Not tempfile: its files can be read by their owner alone.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        beside.write_bytes(blob)
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
