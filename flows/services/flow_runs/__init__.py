"""Flow runs that a home's worker took: whether their processes live, and what becomes of those that died."""
