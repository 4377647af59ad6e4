"""Networks, losses and conversions in pure PyTorch and transformers.

Importing this package registers Lory, Expert Choice, document pools and mixtures with different numbers of experts per
layer with transformers' Auto classes.
"""

from eclectus.models.lory.config import LoryConfig
from eclectus.models.lory.model import LoryForCausalLM
from eclectus.models.lory.routing import LoryCache
from eclectus.models.mixture.layered import (
    LayeredMixtralForCausalLM,
    LayeredQwen2MoeForCausalLM,
    LayeredQwen3MoeForCausalLM,
)
from eclectus.models.pretraining.baselines import ExpertChoiceForCausalLM
from eclectus.models.pretraining.document_pools import DocumentPoolForCausalLM

__all__ = [
    "DocumentPoolForCausalLM",
    "ExpertChoiceForCausalLM",
    "LayeredMixtralForCausalLM",
    "LayeredQwen2MoeForCausalLM",
    "LayeredQwen3MoeForCausalLM",
    "LoryCache",
    "LoryConfig",
    "LoryForCausalLM",
]
