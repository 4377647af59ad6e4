"""Checks the configured Prefect server (PREFECT_API_URL) before any work: one line that names what is wrong."""

from __future__ import annotations

import base64
import json
import os
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path

from eclectus.storage.errors import EclectusError

SECONDS = 10
TRIES = 3
UNSET = "or unset PREFECT_API_URL, to use a server of this home's own"


def check_configured(address: str, auth: Path) -> None:
    """Raises EclectusError unless a Prefect API answers at `address` and accepts our credentials.

    auth: file with the string of this home's own server, for the message. The API is asked twice: 20 ms on loopback.
    """
    shown = _shown(address)
    try:
        scheme, host = urllib.parse.urlsplit(address)[:2]
    except ValueError:
        scheme, host = "", ""
    if scheme not in ("http", "https") or not host:
        raise EclectusError(f"PREFECT_API_URL={shown} is no address; expected http://HOST:PORT/api, {UNSET}")
    address = address.rstrip("/")
    status, body = _ask_patiently(f"{address}/health", shown)
    if status != 200 or body != "true":
        if not address.endswith("/api") and _quietly(f"{address}/api/health") == (200, "true"):
            raise EclectusError(f"PREFECT_API_URL={shown} lacks its end: set it to {_shown(address)}/api")
        if status in (401, 403):
            raise EclectusError(_unauthorized(shown, status, auth))
        raise EclectusError(
            f"PREFECT_API_URL={shown} is not a Prefect API: {_shown(address)}/health answers {status} instead of "
            f"'true'; set it to http://HOST:PORT/api, {UNSET}"
        )
    status, _ = _ask_patiently(f"{address}/admin/version", shown)
    if status in (401, 403):
        raise EclectusError(_unauthorized(shown, status, auth))


def _unauthorized(shown: str, status: int, auth: Path) -> str:
    given = (
        "refuses PREFECT_API_AUTH_STRING" if os.environ.get("PREFECT_API_AUTH_STRING") else "asks for authentication"
    )
    return (
        f"the Prefect server at PREFECT_API_URL={shown} {given} ({status}); set PREFECT_API_AUTH_STRING to its "
        f"USER:PASSWORD (of a server that `eclectus up` started: the line in prefect/{auth.name} of its home), {UNSET}"
    )


def _ask_patiently(url: str, shown: str) -> tuple[int, str]:
    """(status, body). A server that is being started again gets a second and a third chance."""
    for last in range(TRIES):
        try:
            return _ask(url)
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            if last == TRIES - 1 or isinstance(reason, ssl.SSLCertVerificationError):
                raise EclectusError(
                    f"no Prefect server answers at PREFECT_API_URL={shown} ({reason or type(reason).__name__}); "
                    f"start it, correct the address, {UNSET}"
                ) from error
            time.sleep(0.5)
    raise AssertionError("unreachable")


def _quietly(url: str) -> tuple[int, str]:
    try:
        return _ask(url)
    except (OSError, HTTPException):
        return 0, ""


def _ask(url: str) -> tuple[int, str]:
    headers = {}
    if auth := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        headers |= json.loads(os.environ.get("PREFECT_CLIENT_CUSTOM_HEADERS") or "{}")
        request = urllib.request.Request(url, headers=headers)
    except (ValueError, TypeError) as error:
        raise EclectusError(f"PREFECT_API_URL or PREFECT_CLIENT_CUSTOM_HEADERS cannot be used: {error}") from error
    context = ssl.create_default_context(cafile=os.environ.get("PREFECT_API_SSL_CERT_FILE") or None)
    if os.environ.get("PREFECT_API_TLS_INSECURE_SKIP_VERIFY", "").lower() in ("1", "true", "yes", "on"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    try:
        with opener.open(request, timeout=SECONDS) as answer:
            return answer.status, answer.read(100).decode(errors="replace").strip()
    except urllib.error.HTTPError as error:
        return error.code, ""


def _shown(address: str) -> str:
    """Without a password in it."""
    start, at, rest = address.rpartition("@")
    return f"{start.partition('://')[0]}://***@{rest}" if at else address
