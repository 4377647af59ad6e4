"""The few requests that the supervisor and `eclectus down` make of Prefect's API, without importing Prefect (3 s)."""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

TIMEOUT = 10.0
# The server's answer when its database is locked by other requests; such a request has changed nothing.
BUSY = 503
BUSY_PAUSES = (0.3, 1.0, 2.0)
MOST = 200


class Api:
    """address: of the API, as in PREFECT_API_URL. authentication: "user:password", as in PREFECT_API_AUTH_STRING.

    Every request raises OSError when the server does not answer, or answers with an error other than 404.
    """

    def __init__(self, address: str, authentication: str | None = None) -> None:
        self._address = address.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if authentication:
            self._headers["Authorization"] = "Basic " + base64.b64encode(authentication.encode()).decode()
        # Whatever proxies are configured, this machine is not behind one.
        here = urllib.parse.urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
        handlers = [urllib.request.ProxyHandler({})] if here else []
        self._open = urllib.request.build_opener(*handlers).open

    @classmethod
    def of_environment(cls) -> Api | None:
        address = os.environ.get("PREFECT_API_URL")
        return cls(address, os.environ.get("PREFECT_API_AUTH_STRING")) if address else None

    def request(self, method: str, path: str, body: Any = None, timeout: float = TIMEOUT) -> Any:
        """The answer as JSON, {} if it is empty, None for 404."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, self._headers, method=method)
        for pause in BUSY_PAUSES:
            try:
                return self._answer(request, timeout)
            except urllib.error.HTTPError as error:
                if error.code != BUSY:
                    raise
            time.sleep(pause)
        return self._answer(request, timeout)

    def _answer(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with self._open(request, timeout=timeout) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        except (http.client.HTTPException, ValueError) as error:
            # It died while it answered.
            raise OSError(f"{self._address} did not answer whole: {error}") from error

    def flow_run(self, flow_run: str, timeout: float = TIMEOUT) -> dict[str, Any] | None:
        """None for one that was deleted."""
        return self.request("GET", f"/flow_runs/{flow_run}", timeout=timeout)

    def flow_runs(self, **filters: Any) -> list[dict[str, Any]]:
        """All that match, whatever their number."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.request(
                "POST", "/flow_runs/filter", {"flow_runs": filters, "limit": MOST, "offset": len(found)}
            )
            found += page or []
            if len(page or []) < MOST:
                return found

    def states(self, flow_run: str) -> list[dict[str, Any]]:
        """Oldest first."""
        states = self.request("GET", f"/flow_run_states/?flow_run_id={flow_run}") or []
        return sorted(states, key=lambda state: str(state["timestamp"]))

    def set_state(self, flow_run: str, kind: str, message: str, name: str | None = None) -> None:
        """Whatever state it is in. Prefect frees the run's slot of a concurrency limit when it leaves its states."""
        state = {"type": kind, "message": message, **({"name": name} if name else {})}
        self.request("POST", f"/flow_runs/{flow_run}/set_state", {"state": state, "force": True})
