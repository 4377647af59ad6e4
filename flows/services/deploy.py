"""`eclectus deploy`: registers the work pool, the deployments of prefect.yaml and the automations with the server.

Safe to repeat: existing ones are updated. `eclectus up` and the deploy job of docker-compose.yml call it.
"""

from __future__ import annotations

import contextlib
import io
import os
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
    """The folder of prefect.yaml and of the flows: $ECLECTUS_DIRECTORY, or the checkout of this code."""
    folder = Path(os.environ.get("ECLECTUS_DIRECTORY") or Path(__file__).resolve().parents[2])
    if not (folder / "prefect.yaml").is_file():
        raise EclectusError(f"{folder} has no prefect.yaml; set ECLECTUS_DIRECTORY to a checkout of Eclectus")
    return folder


def _prefect(*words: str) -> None:
    """Runs one `prefect` command in this process. Raises EclectusError with its output when it fails.

    A process for each command would spend 4 s on importing Prefect again. `prefect.cli.app` only reads `sys.argv`, so
    the command line object behind it is called, which takes the words as an argument.
    """
    from prefect.cli._app import _app as prefect_commands

    output = io.StringIO()
    with contextlib.chdir(project()), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            prefect_commands.meta(words)
            code: object = 0
        except SystemExit as end:
            code = end.code
    if code:
        raise EclectusError(f"`prefect {' '.join(words)}` failed: {output.getvalue().strip()[-500:]}")
