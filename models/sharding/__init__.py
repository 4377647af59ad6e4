"""Models whose weights are read, held and written in parts: no process holds one that is trained sharded."""
