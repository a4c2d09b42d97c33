"""The paged score cache and its spec."""
