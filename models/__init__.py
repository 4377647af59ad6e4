"""Networks, losses and conversions in pure PyTorch and transformers.

Importing this package registers Lory, Expert Choice and mixtures with different experts per layer with transformers' Auto classes.
"""

from .baselines import ExpertChoiceForCausalLM
from .layered import LayeredMixtralForCausalLM, LayeredQwen2MoeForCausalLM, LayeredQwen3MoeForCausalLM
from .lory import LoryForCausalLM
from .lory_config import LoryConfig
from .lory_routing import LoryCache

__all__ = [
    "ExpertChoiceForCausalLM",
    "LayeredMixtralForCausalLM",
    "LayeredQwen2MoeForCausalLM",
    "LayeredQwen3MoeForCausalLM",
    "LoryCache",
    "LoryConfig",
    "LoryForCausalLM",
]
