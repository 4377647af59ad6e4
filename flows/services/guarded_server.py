"""Prefect's server for one machine: on a socket that it inherits, for pages of its own UI only.

    python -m eclectus.flows.services.guarded_server "prefect server start" --port=PORT --fd=N --keeper=PID

Prefect's own command takes any Host and Origin, so that any web page could reach a server on loopback (with DNS
rebinding even as its own). Here requests need the auth string, but for the pages of the UI, `ui-settings` (which UIs
there are), `/api/health` and `/api/ready`, the API's description (`/docs`, `/openapi.json`) and the page that logs a
browser in; and all are refused that name another host than this machine's loopback or come from a page of another
origin.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from eclectus.flows.services.background import die_with
from eclectus.flows.services.ports import LOOPBACK, names_loopback
from eclectus.flows.services.server_note import LOGIN

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# The address of this page carries the auth string after `#`; Prefect's UIs look for it under this name.
LOGIN_PAGE = b"""<!doctype html><meta charset="utf-8"><title>Eclectus</title>
<script>
const key = decodeURIComponent(location.hash.slice(1));
if (key) localStorage.setItem("prefect-password", btoa(key));
location.replace("/");
</script>
"""
# A client that is gone without a word holds its connection.
CLOSE_SECONDS = 5


class Guard:
    """Refuses requests that a page of another origin makes, or that reach this server by another name."""

    def __init__(self, app: App, port: int) -> None:
        self.app = app
        self.origins = {f"http://{name}:{port}" for name in LOOPBACK}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif why := self.why_refused(scope["headers"]):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008, "reason": why})
            else:
                await _answer(send, 403, b"text/plain", f"refused: {why}\n".encode())
        elif scope["type"] == "http" and scope["path"] == LOGIN:
            await _answer(send, 200, b"text/html", LOGIN_PAGE)
        else:
            await self.app(scope, receive, send)

    def why_refused(self, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
        hosts = [value.decode("latin-1") for name, value in headers if name.lower() == b"host"]
        if not names_loopback(hosts):
            return "the Host header names another machine"
        origins = {value.decode("latin-1") for name, value in headers if name.lower() == b"origin"}
        if not origins <= self.origins:
            return "the Origin header names another site"
        return None


async def _answer(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind + b"; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    """Serves until SIGTERM or the keeper's end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shown", help="what process lists show")
    for name in ("port", "fd", "keeper"):
        parser.add_argument(f"--{name}", type=int, required=True)
    chosen = parser.parse_args()
    die_with(chosen.keeper)
    os.environ |= port_settings(chosen.port)
    import uvicorn
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    settings = get_current_settings().server
    config = uvicorn.Config(
        Guard(create_app(final=True), chosen.port),
        log_level=settings.logging_level.lower(),
        timeout_keep_alive=settings.api.keepalive_timeout,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=chosen.fd)])


def port_settings(port: int) -> dict[str, str]:
    """Environment of the server. On other ports than 4200 the UI needs the API's address."""
    address = f"http://127.0.0.1:{port}/api"
    settings = {
        "PREFECT_API_URL": address,
        "PREFECT_SERVER_UI_API_URL": address,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in LOOPBACK),
    }
    # Relative to the folder, which may have a name that no URL can hold.
    urls = ("PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL")
    if not any(os.environ.get(name) for name in urls):
        settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = "sqlite+aiosqlite:///prefect.db"
    return settings


if __name__ == "__main__":
    main()
