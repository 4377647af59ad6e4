"""The parts of `ingest`: how sources are cut, what becomes of their records, and how documents parts are made."""
