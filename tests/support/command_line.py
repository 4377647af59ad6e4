"""The command line in the process of a test."""

from __future__ import annotations

from typing import Any

import pytest

from eclectus.flows.cli.main import main


def run_command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command; what was printed before is dropped."""
    code = 0
    capsys.readouterr()
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert isinstance(end.code, int)
        code = end.code
    said = capsys.readouterr()
    return code, said.out, said.err
