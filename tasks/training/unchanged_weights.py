"""Weights that an extension must not change: their digests are checked while it trains, and before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.models.training.precision import FrozenWeights


class UnchangedWeights:
    """The weights of a model that do not train, and the original ones of a mixture.

    Raises EclectusError, naming the training step, where one of them changed.
    """

    def __init__(self, model: Any, method: str) -> None:
        """method: of the extension; moe_all trains original weights too."""
        from eclectus.models.extension.methods import untrained_digest

        self._model, self._method = model, method
        self._untrained, self._original = untrained_digest(model), _original_digest(model)
        self._in_training = self._untrained
        self._held: FrozenWeights | None = None

    def hold_in_bfloat16(self, originals: Path, restores: bool) -> None:
        """Rounds them for the training (`FrozenWeights`, which says what the arguments are)."""
        from eclectus.models.extension.methods import untrained_digest
        from eclectus.models.training.precision import FrozenWeights

        self._held = FrozenWeights(self._model, originals, restores)
        self._in_training = untrained_digest(self._model)

    def check(self, step: int) -> None:
        """Called before every checkpoint of the training."""
        self._compare(self._in_training, step)

    def restore(self, step: int) -> str | None:
        """Puts the values from before back in a whole model and checks them. Returns the digest of the original weights
        of a mixture."""
        if self._held:
            self._held.restore()
        self._compare(self._untrained, step)
        if self._original is not None and self._method != "moe_all" and _original_digest(self._model) != self._original:
            raise EclectusError(f"an original weight changed before training step {step}; nothing was kept")
        return self._original

    def _compare(self, digest: str, step: int) -> None:
        from eclectus.models.extension.methods import untrained_digest

        if untrained_digest(self._model) != digest:
            raise EclectusError(f"a weight that does not train changed before training step {step}; nothing was kept")


def _original_digest(model: Any) -> str | None:
    """`frozen_digest` of a mixture, equal to its base's; None for models without a frozen copy of the base."""
    from eclectus.models.mixture.experts import frozen_digest

    return frozen_digest(model) if hasattr(model.config, "num_experts_per_tok") else None
