"""An output folder that the processes of a sharded model fill together: whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from eclectus.models.staged_folder import staged_folder
from eclectus.models.training.process import Process


@contextlib.contextmanager
def staged_together(out_dir: Path, process: Process) -> Iterator[Path]:
    """`staged_folder` of rank 0, the same folder in all processes; published when all have left the block.

    Raises ValueError, in all processes, where rank 0 cannot make the folder.
    """
    partial, fault = None, None
    with contextlib.ExitStack() as stack:
        if process.is_main:
            try:
                partial = stack.enter_context(staged_folder(out_dir))
            except ValueError as error:
                fault = str(error)
        partial, fault = process.gather((partial, fault))[0]
        if partial is None:
            raise ValueError(fault)
        yield partial
        process.barrier()
    process.barrier()
