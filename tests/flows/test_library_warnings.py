"""What libraries remind of stays out of the terminal and is kept in the home; their errors are seen, and kept too."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from eclectus.flows.library_warnings import LOG, LOGGERS, VERBOSITY, library_warnings_logged, limit_verbosity
from eclectus.flows.parameters import CurateParameters
from eclectus.flows.run import open_run


def test_warnings_of_a_run_go_to_a_file_of_the_home_and_errors_to_the_terminal_too(home, capsys):
    with open_run("curate", CurateParameters(), home):
        warnings.warn("is deprecated and will be removed", FutureWarning, stacklevel=1)
        for name in LOGGERS:
            logging.getLogger(f"{name}.part").warning("a reminder of %s", name)
        logging.getLogger("ray.train").error("a worker is gone")
    output = capsys.readouterr()
    assert output.out == "" and output.err == "ray.train: a worker is gone\n"
    written = (home.root / LOG).read_text()
    assert "FutureWarning: is deprecated and will be removed" in written
    assert all(f"WARNING {name}.part: a reminder of {name}" in written for name in LOGGERS)
    assert "ERROR ray.train: a worker is gone" in written


def test_a_run_without_warnings_makes_no_file_and_leaves_loggers_as_they_were(tmp_path):
    before = [(logging.getLogger(name).propagate, list(logging.getLogger(name).handlers)) for name in LOGGERS]
    shows = warnings.showwarning
    with pytest.raises(ZeroDivisionError), library_warnings_logged(tmp_path):
        raise ZeroDivisionError
    assert not (tmp_path / LOG).exists() and warnings.showwarning is shows
    assert before == [(logging.getLogger(name).propagate, logging.getLogger(name).handlers) for name in LOGGERS]


def test_no_secret_is_written_and_own_messages_are_not_touched(tmp_path, capsys, caplog):
    with library_warnings_logged(tmp_path):
        logging.getLogger("botocore").error("https://me:hunter2hunter2@host/x failed")
        with caplog.at_level(logging.WARNING, "eclectus"):
            logging.getLogger("eclectus").warning("ours")
    assert "hunter2" not in (tmp_path / LOG).read_text() + capsys.readouterr().err
    assert "ours" in caplog.text


def test_libraries_with_handlers_of_their_own_are_limited_to_errors_unless_a_user_wants_more(monkeypatch):
    for name in VERBOSITY:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    limit_verbosity()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info" and os.environ["DATASETS_VERBOSITY"] == "error"


def test_torch_prints_errors_only():
    code = (
        "import eclectus.flows.library_warnings as of; of.limit_verbosity(); import logging, torch;"
        "log = logging.getLogger('torch.distributed'); log.warning('a reminder'); log.error('an error')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a reminder" not in done.stderr and "an error" in done.stderr
