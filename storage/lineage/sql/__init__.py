"""The lineage as SQL: columns of its files, reading them, and the tables and macros that users query."""
