"""Networks, losses and conversions in pure PyTorch and transformers.

Importing this package registers Lory and Expert Choice with transformers' Auto classes.
"""

from .baselines import ExpertChoiceForCausalLM
from .lory import LoryForCausalLM
from .lory_config import LoryConfig
from .lory_routing import LoryCache

__all__ = ["ExpertChoiceForCausalLM", "LoryCache", "LoryConfig", "LoryForCausalLM"]
