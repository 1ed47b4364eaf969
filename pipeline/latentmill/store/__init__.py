"""The store format on disk: schema, shard writers, commits, index, reading a store."""
