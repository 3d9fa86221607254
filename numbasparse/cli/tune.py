"""`tune --workers`: the same command in several processes, then once more for what is left and for the file."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from autotune.workers import places, run_together, this_command
from numbasparse.plans import parse_device


def tune_together(count: int, device: str, threads: int | None, storage: str | None, out: Path) -> None:
    """Run this process's command as ``count`` workers, then alone, which finds everything measured.

    Raises
    ------
    ValueError
        If there is no place for each worker.
    RuntimeError
        If the last run failed; what was measured is in the storage, if one was given.
    """
    kind, index = parse_device(device)
    if index is not None:
        raise ValueError(f"workers take a GPU each: give --device cuda instead of {device}, or no --workers")
    where = places(kind, count, threads)
    with tempfile.TemporaryDirectory(prefix="numbasparse-tune-") as folder:
        command = this_command()
        if storage is None:
            command += ["--storage", str(Path(folder) / "journal")]
        # Each worker writes the whole file in the end: into its own, so that the last run has the last word.
        statuses = run_together([*command, "--out", str(Path(folder) / "tuned.json")], where)
        for number, status in enumerate(statuses):
            if status != 0:
                print(f"worker {number} ended with status {status}: the others have measured what it left")
        if subprocess.run(command, check=False).returncode != 0:
            raise RuntimeError(f"the workers could not finish {out}: see above")
