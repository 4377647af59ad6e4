"""From sources to a table of documents: readers, ingest, languages, split."""
