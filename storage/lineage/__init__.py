"""Lineage: DuckDB views over the journals, and what answers from them."""

from eclectus.storage.lineage.connection import connect, query

__all__ = ["connect", "query"]
