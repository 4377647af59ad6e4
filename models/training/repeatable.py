"""Nothing in a training is random but what its seed decides: dropout and router noise of a configuration are off.

A configuration may ask for dropout (attention_dropout, resid_pdrop, ...) or noise (router_jitter_noise). These would
draw from a generator whose state no checkpoint keeps, so neither a repeated nor a resumed training would end with the
same bits.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

# Parts of the names of fields that are the probability or strength of something random.
RANDOM = ("drop", "jitter")


def switch_off_randomness(model: nn.Module) -> dict[str, float]:
    """Sets dropout and noise to 0 in all modules and their configurations; returns what was on, by the field's name.

    A checkpoint of the model then says 0, which is what it was trained with.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        # Modules copy the fields that they read; a configuration may be shared by modules or copied.
        for holder in (getattr(module, "config", None), module):
            for field, value in _random_fields(holder).items():
                setattr(holder, field, 0.0)
                # A module's copy may have a shorter name: jitter_noise for router_jitter_noise.
                if not any(field in other and found[other] == value for other in found):
                    found.setdefault(field, value)
        if isinstance(module, _DropoutNd) and module.p > 0:
            found.setdefault(name.rpartition(".")[2], module.p)
            module.p = 0.0
    return found


def _random_fields(holder: Any) -> dict[str, float]:
    """The fields of an object that are named as random and are numbers above 0."""
    return {
        field: value
        for field, value in getattr(holder, "__dict__", {}).items()
        if any(part in field for part in RANDOM) and type(value) in (int, float) and value > 0
    }
