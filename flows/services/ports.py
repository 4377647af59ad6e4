"""Ports on loopback. Those that users keep links to stay the same for a home over `down` and `up`."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from eclectus.storage.atomic_write import write_atomically

PORTS = "ports.json"
# As many connections wait in the kernel while the server is started again.
BACKLOG = 512
# How this machine is called in addresses.
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def names_loopback(hosts: Sequence[str]) -> bool:
    """Whether a request has one Host header, and that names this machine: a page with DNS rebinding names another."""
    return len(hosts) == 1 and re.sub(r":\d+$", "", hosts[0]) in LOOPBACK


def free_port(wanted: int = 0) -> int:
    """A free port on loopback: `wanted` if it is free."""
    with listening(wanted) as probe:
        return int(probe.getsockname()[1])


def listening(wanted: int = 0) -> socket.socket:
    """A socket on loopback, at `wanted` if that port is free, to which others can connect from now on."""
    listener = socket.socket()
    # Closed connections hold a port for a minute; without this, `up` after `down` would get another address.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", wanted))
        listener.listen(BACKLOG)
    except (OSError, OverflowError):
        listener.close()
        if not wanted:
            raise
        return listening()
    return listener


def home_port(folder: Path, name: str, wanted: int = 0) -> int:
    """A free port: the one that this home had under this name, else `wanted`, else any."""
    return free_port(kept_port(folder, name, wanted))


def kept_port(folder: Path, name: str, wanted: int = 0) -> int:
    """The port that this home had under this name, else `wanted`, free or not."""
    return _read(folder).get(name) or wanted


def keep_port(folder: Path, name: str, port: int) -> None:
    """Remembers the port for `home_port`; a home that cannot be written forgets it."""
    ports = _read(folder)
    if ports.get(name) != port:
        with contextlib.suppress(OSError):
            write_atomically(folder / PORTS, json.dumps(ports | {name: port}))


def _read(folder: Path) -> dict[str, int]:
    try:
        rows = json.loads((folder / PORTS).read_text())
        return {str(name): port for name, port in rows.items() if isinstance(port, int) and 0 < port < 65536}
    except (OSError, ValueError, AttributeError):
        return {}
