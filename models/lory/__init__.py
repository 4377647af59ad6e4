"""Lory: a fully differentiable mixture of experts (arXiv 2405.03133).

Importing it registers the model with transformers.
Imports only torch, transformers, safetensors and itself: a Lory checkpoint carries these files.
"""

from .config import LoryConfig
from .model import LoryForCausalLM
from .routing import LoryCache

__all__ = ["LoryCache", "LoryConfig", "LoryForCausalLM"]
