"""Eclectus: mixture-of-experts language models from a corpus of documents, with the lineage of every model."""

from pathlib import Path

# In a checkout the four packages stand beside this folder; in a wheel they are inside it.
__path__ = [*__path__, *(str(root) for root in [Path(__file__).parent.parent] if (root / "prefect.yaml").exists())]
