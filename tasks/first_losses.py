"""Keeps the losses of documents when a training first saw them, for the lineage's table `first_losses`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from eclectus.storage.artifact import Artifact
from eclectus.storage.atomic_write import replacing
from eclectus.tasks.run import current_run

FOLDER = "first_losses"


def keep_first_losses(work: Path, instances: Artifact) -> None:
    """Copies what the running step's training noted (models/training/first_losses.py) into the journal; about 4 bytes
    for each span. A disk that is full ends no training here."""
    from eclectus.models.training.first_losses import NAME

    run, noted = current_run(), work / NAME
    if run is None or run.step is None or not noted.exists():
        return
    losses = np.fromfile(noted, np.float32)
    spans = np.flatnonzero(~np.isnan(losses))
    table = pa.table(
        {
            "step": pa.array([run.step] * len(spans), pa.string()).dictionary_encode(),
            "instances": pa.array([instances.digest] * len(spans), pa.string()).dictionary_encode(),
            "span": pa.array(spans, pa.int64()),
            "loss": pa.array(losses[spans], pa.float32()),
        }
    )
    path = run.home.journal / FOLDER / f"{run.step}.parquet"
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as temporary:
            pq.write_table(
                table, temporary, compression="zstd", use_dictionary=["step", "instances"],
                column_encoding={"span": "DELTA_BINARY_PACKED", "loss": "PLAIN"},
            )  # fmt: skip
        if run.home.mirror:
            run.home.mirror.push(path)
    except OSError as error:
        logging.getLogger("eclectus").warning("first losses of '%s' were not kept: %s", run.label, error)
