"""The commit log on disk: codec, segments, snapshot, compaction, recovery."""
