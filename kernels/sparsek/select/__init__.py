"""Which units every item and KV head keeps."""
