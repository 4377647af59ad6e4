"""Errors that users can fix: each message names the culprit, what was expected and what to do."""


class EclectusError(Exception):
    """Invalid user input (a path, a setting, a file); shown as one line, never as a traceback."""


class DamagedArtifact(EclectusError):
    """An artifact whose files differ from its manifest."""
