"""`up`'s worker: Prefect's process worker, which notes each run before it takes it, and starts none twice.

python -m eclectus.flows.services.flow_runs.worker POOL NAME
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from prefect.settings import get_current_settings
from prefect.utilities.processutils import setup_signal_handlers_worker
from prefect.workers.process import ProcessWorker

from eclectus.flows.services.flow_runs.notes import BEAT, TOKEN, processes, read_note, remove_note, write_note


class NotingWorker(ProcessWorker):
    """Keeps notes (flows/services/flow_runs/notes.py) in $PREFECT_HOME, which is the home's `prefect`."""

    async def get_and_submit_flow_runs(self) -> list[Any]:
        (self._folder / BEAT).touch()
        return await super().get_and_submit_flow_runs()

    async def _propose_pending_state(self, flow_run: Any) -> bool:
        name = str(flow_run.id)
        if name in processes(os.environ.get(TOKEN, "")):
            # An automation may take a run for dead whose process lives; it is started again when that has ended.
            self.get_flow_run_logger(flow_run).info("It is not started: the process of an earlier start still lives.")
            return False
        before = read_note(self._folder, name)
        note = write_note(self._folder, name)
        taken = await super()._propose_pending_state(flow_run)
        if not taken and before is None:
            remove_note(self._folder, note)
        return taken

    @property
    def _folder(self) -> Path:
        return Path(os.environ["PREFECT_HOME"])


def main(pool: str, name: str) -> None:
    setup_signal_handlers_worker(os.getpid(), "the worker", print)
    settings = get_current_settings().worker
    worker = NotingWorker(
        name=name,
        work_pool_name=pool,
        prefetch_seconds=settings.prefetch_seconds,
        heartbeat_interval_seconds=int(settings.heartbeat_seconds),
    )
    try:
        asyncio.run(worker.start())
    except asyncio.CancelledError:
        print(f"{name} stopped")


if __name__ == "__main__":
    main(*sys.argv[1:])
