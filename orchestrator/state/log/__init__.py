"""The on-disk commit log: codec, segments, snapshot, compaction, recovery."""
