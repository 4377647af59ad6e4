"""Networks, losses and conversions in pure PyTorch and transformers.

Importing this package registers Lory with transformers' Auto classes.
"""

from .lory import LoryForCausalLM
from .lory_config import LoryConfig
from .lory_routing import LoryCache

__all__ = ["LoryCache", "LoryConfig", "LoryForCausalLM"]
