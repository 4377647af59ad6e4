"""Serves the reports of a home on loopback, so that the links to them in Prefect's UI open.

    python -m eclectus.flows.services.pages FOLDER PORT

Only files under FOLDER, no lists of them, and nothing to pages of other sites: a report holds text of the corpus.
"""

from __future__ import annotations

import sys
import urllib.parse
from collections.abc import Sequence
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from eclectus.flows.services.ports import names_loopback


class Pages(SimpleHTTPRequestHandler):
    """GET and HEAD of files."""

    # One that opens a connection and says nothing is let go.
    timeout = 60

    def send_head(self) -> Any:
        """As the base class, which calls it for GET and HEAD alike, for what may be shown."""
        if not names_loopback(self.headers.get_all("Host") or []):
            return self.send_error(HTTPStatus.FORBIDDEN, "the Host header names another machine")
        embedded = self.headers.get("Sec-Fetch-Mode", "navigate") != "navigate"
        if self.headers.get("Sec-Fetch-Site") == "cross-site" and embedded:
            return self.send_error(HTTPStatus.FORBIDDEN, "asked for by a page of another site")
        root, path = Path(self.directory).resolve(), Path(self.translate_path(self.path)).resolve()
        named = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hidden = any(part.startswith(".") for part in named.split("/"))
        if hidden or named.endswith("/") or not path.is_relative_to(root) or not path.is_file():
            return self.send_error(HTTPStatus.NOT_FOUND, "no such report")
        return super().send_head()

    def end_headers(self) -> None:
        self.send_header("X-Content-Type-Options", "nosniff")
        super().end_headers()


def main(words: Sequence[str]) -> None:
    folder, port = words

    def handler(*arguments: Any) -> Pages:
        return Pages(*arguments, directory=folder)

    ThreadingHTTPServer(("127.0.0.1", int(port)), handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
