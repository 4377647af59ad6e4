"""The one display that tests put into a run."""

from __future__ import annotations


class NullDisplay:
    """Shows nothing and keeps what a run reported: `texts`, the sentences in their order."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def step_began(self, *_) -> None: ...

    def step_progressed(self, *_) -> None: ...

    def step_ended(self, *_) -> None: ...

    def notified(self, name: str, text: str) -> None:
        self.texts.append(text)

    def linked(self, *_) -> None: ...
