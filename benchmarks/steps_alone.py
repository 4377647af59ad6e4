"""Steps of the pipeline for benchmarks, one by one and without a run."""

from collections.abc import Callable
from typing import Any

from eclectus.storage.artifact import Artifact, ArtifactStore


def maker(store: ArtifactStore) -> Callable[..., Artifact]:
    """A function that calls a step's own function with arguments and keeps what it makes in the store."""

    def make(step: Any, **arguments: Any) -> Artifact:
        with store.draft(step.makes) as out:
            step.function(**arguments, out=out)
            return store.commit(out)

    return make
