"""`prefect/server.json`: the address of a home's Prefect server, and the processes behind it."""

from __future__ import annotations

import json
import os
import urllib.request
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path

from eclectus.flows.services.background import Background
from eclectus.storage.atomic_write import write_atomically

NOTE = "server.json"
# The page that logs a browser in; the auth string follows after `#`, which browsers do not send.
LOGIN = "/eclectus-login"


@dataclass(frozen=True)
class ServerNote:
    """The API's address, the server's process and the keeper's.

    folder: identity of the prefect folder that it is about; a copy of a home has another.
    """

    address: str
    server: Background
    keeper: Background
    folder: str

    def write(self, folder: Path) -> None:
        write_atomically(folder / NOTE, json.dumps(asdict(self)))


def read_note(folder: Path) -> ServerNote | None:
    """None without a note, or if it is damaged, of an earlier version, or about the home that this is a copy of."""
    try:
        note = json.loads((folder / NOTE).read_text())
        server, keeper = Background(**note["server"]), Background(**note["keeper"])
        noted = ServerNote(str(note["address"]), server, keeper, str(note["folder"]))
        return noted if noted.folder == identity(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def identity(folder: Path) -> str:
    """What stays the same when a folder is moved, and differs for a copy."""
    found = os.stat(folder)
    return f"{found.st_dev}:{found.st_ino}"


def port_of(address: str) -> int:
    return int(address.removesuffix("/api").rpartition(":")[2])


def is_up(address: str, seconds: float = 2) -> bool:
    """Whether a Prefect API answers at this address on loopback, whatever proxies are configured."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{address}/health", timeout=seconds) as answer:
            return answer.status == 200
    except (OSError, HTTPException):
        return False
