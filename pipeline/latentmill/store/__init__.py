"""The format on disk: schema, shard writers, commits, index, opening a store."""
