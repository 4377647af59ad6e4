"""`eclectus deploy`: registers the work pool, the deployments of prefect.yaml and the automations with the configured server.

Safe to repeat: what is there is updated. `eclectus up` and the deploy job of docker-compose.yml call it. Prefect's commands run in this
process: each start of `prefect` would import it and the flows anew, which is most of what they take.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from pathlib import Path

from eclectus.storage.errors import EclectusError

POOL = "eclectus"


def deploy() -> list[str]:
    """Returns the names of the automations. Raises EclectusError when no server is configured or it refuses."""
    if not os.environ.get("PREFECT_API_URL"):
        raise EclectusError("no Prefect server is configured; set PREFECT_API_URL, or start one with: eclectus up")
    os.environ.setdefault("ECLECTUS_DIRECTORY", str(project()))
    _prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    _prefect("--no-prompt", "deploy", "--all")
    from eclectus.flows.services.automations import create_automations

    return create_automations()


def project() -> Path:
    """The folder of prefect.yaml and of the flows: $ECLECTUS_DIRECTORY, or where this code lies."""
    folder = Path(os.environ.get("ECLECTUS_DIRECTORY") or Path(__file__).resolve().parents[2])
    if not (folder / "prefect.yaml").is_file():
        raise EclectusError(f"{folder} holds no prefect.yaml; set ECLECTUS_DIRECTORY to a checkout of Eclectus")
    return folder


def _prefect(*words: str) -> None:
    from prefect.cli import app

    ours, said, code = sys.argv, io.StringIO(), 0
    with contextlib.chdir(project()), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            sys.argv = ["prefect", *words]
            app()
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = ours
    if code:
        raise EclectusError(f"`prefect {' '.join(words)}` failed: {said.getvalue().strip()[-500:]}")
