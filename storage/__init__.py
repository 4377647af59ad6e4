"""Artifacts and lineage: files and DuckDB, nothing of torch or Prefect."""
