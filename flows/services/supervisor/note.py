"""`prefect/services.json`: what `eclectus up` runs for a home, for later commands and the next supervisor.

It survives a power cut and a killed supervisor, is removed by `down`, and says whose it is: in a copy of a home, the
note is about the original's processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eclectus.flows.services.background import Background
from eclectus.flows.services.server_note import identity
from eclectus.flows.services.users import waited_lock
from eclectus.storage.atomic_write import replacing

NOTE = "services.json"
LOCK = "up.lock"
# Its time says when the supervisor last looked at its services.
BEAT = "supervisor.beat"
# `down` may take a minute, and nothing else holds the lock for long.
LOCK_SECONDS = 180.0


@dataclass
class UpNote:
    """token: in the environment of everything that runs. ray: folder of Ray and of all temporary files.

    status: what is wrong, by service; empty when all is up. failures: how often in a row. ready: all is up. path,
    identity: of `folder`.
    """

    path: str
    identity: str
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    ray: str = ""
    ray_token: str = ""
    ray_ports: dict[str, int] = field(default_factory=dict)
    pages: str = ""
    api: str = ""
    ui: str = ""
    services: list[dict[str, Any]] = field(default_factory=list)
    supervisor: dict[str, Any] | None = None
    status: dict[str, str] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    ready: bool = False

    @classmethod
    def new(cls, folder: Path) -> UpNote:
        # Ray puts sockets into this folder, whose paths must be short; a path in the home may be too long.
        ray = tempfile.mkdtemp(prefix="eclectus-ray-")
        return cls(str(folder.resolve()), identity(folder), ray=ray, ray_token=secrets.token_hex(32))

    def write(self, folder: Path) -> None:
        with replacing(folder / NOTE) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(asdict(self)))

    def running(self) -> list[Background]:
        return [service for service in self.noted() if service.is_alive()]

    def noted(self) -> list[Background]:
        return [Background(**service) for service in self.services]

    def supervisor_running(self) -> Background | None:
        found = Background(**self.supervisor) if self.supervisor else None
        return found if found and found.is_alive() else None


def read_up_note(folder: Path) -> UpNote | None:
    """None without a note, with a damaged one, and in a copy of a home, whose services are the original's."""
    try:
        read = json.loads((folder / NOTE).read_text())
        known = {name: value for name, value in read.items() if name in UpNote.__dataclass_fields__}
        note = UpNote(**{"path": str(folder.resolve()), "identity": identity(folder), "token": "", **known})
        note.running()
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    # Of a folder that was moved to another file system nothing is left that could stop its services.
    copied = note.identity != identity(folder) and Path(note.path).exists()
    return None if copied else note


def up_lock(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Held while services are started or stopped as a whole. Raises EclectusError after LOCK_SECONDS."""
    path = folder / LOCK
    return waited_lock(
        path, LOCK_SECONDS, lambda _: f"another `eclectus up` or `down` holds {path}; end it and try again"
    )


def beat_age(folder: Path) -> float:
    """Seconds since the supervisor's last look, by the file's time; a step of the clock can make it wrong."""
    with contextlib.suppress(OSError):
        return time.time() - os.stat(folder / BEAT).st_mtime
    return float("inf")
