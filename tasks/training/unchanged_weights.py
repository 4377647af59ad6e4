"""Weights that an extension must not change: their digests are checked while it trains, and before it is written."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from eclectus.storage.errors import EclectusError

if TYPE_CHECKING:
    from eclectus.models.sharding.blueprint import Blueprint
    from eclectus.models.training.precision import FrozenWeights
    from eclectus.models.training.process import Process


class UnchangedWeights:
    """A model made from a blueprint, `model`, whose weights that do not train must not change, nor a mixture's original
    ones.

    Raises EclectusError, naming the training step, where one of them changed. All processes must call its functions.
    """

    def __init__(self, blueprint: Blueprint, method: str, process: Process, sharded: bool) -> None:
        """method: of the extension; moe_all trains original weights too."""
        from eclectus.models.extension.methods import untrained_digest

        self._blueprint, self._method, self._process, self._sharded = blueprint, method, process, sharded
        self.model: Any = blueprint.make(process, sharded)
        self._untrained, self._original = untrained_digest(self.model), _original_digest(self.model)
        self._in_training = self._untrained
        self._held: FrozenWeights | None = None

    def hold_in_bfloat16(self) -> None:
        """Rounds them for the training (`FrozenWeights`). A sharded model is made anew: shards keep their type."""
        from eclectus.models.extension.methods import untrained_digest
        from eclectus.models.training.parallel import is_sharded

        if is_sharded(self.model):
            self.model = None
            # Sharded modules are in circles of references.
            gc.collect()
            self.model = self._blueprint.make(self._process, self._sharded, self._hold, half=True)
        else:
            self._hold(self.model)
        self._in_training = untrained_digest(self.model)

    def _hold(self, model: Any) -> None:
        from eclectus.models.training.precision import FrozenWeights

        self._held = FrozenWeights(model, self._blueprint.values)

    def check(self, step: int) -> None:
        """Called before every checkpoint of the training."""
        self._compare(self._in_training, step)

    def restore(self, step: int) -> str | None:
        """Puts the values from before back and checks them. Returns the digest of the original weights of a mixture."""
        from eclectus.models.training.parallel import is_sharded

        if self._held and is_sharded(self.model):
            self._make_anew()
        elif self._held:
            self._held.restore()
        self._compare(self._untrained, step)
        if self._original is not None and self._method != "moe_all" and _original_digest(self.model) != self._original:
            raise EclectusError(f"an original weight changed before training step {step}; nothing was kept")
        return self._original

    def _make_anew(self) -> None:
        """The model as it is stored, with what has been trained."""
        from eclectus.models.training.parallel import local

        named = self.model.named_parameters()
        trained = {name: parameter.detach() for name, parameter in named if parameter.requires_grad}
        self.model = self._held = None
        gc.collect()
        self.model = self._blueprint.make(self._process, self._sharded)
        for name, parameter in self.model.named_parameters():
            if name in trained:
                local(parameter.detach()).copy_(local(trained.pop(name)))

    def _compare(self, digest: str, step: int) -> None:
        from eclectus.models.extension.methods import untrained_digest

        if untrained_digest(self.model) != digest:
            raise EclectusError(f"a weight that does not train changed before training step {step}; nothing was kept")


def _original_digest(model: Any) -> str | None:
    """`frozen_digest` of a mixture, equal to its base's; None for models without a frozen copy of the base."""
    from eclectus.models.mixture.experts import frozen_digest

    return frozen_digest(model) if hasattr(model.config, "num_experts_per_tok") else None
