"""The errors that people can mend: each message names the culprit, what was expected and what to do."""


class EclectusError(Exception):
    """A fault in what a person brought (a path, a setting, a file); shown as one line, never as a traceback."""


class DamagedArtifact(EclectusError):
    """An artifact whose files are not those that its manifest lists."""
