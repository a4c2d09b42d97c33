"""Keys, values and linear scores of new tokens into their paged caches, in one pass."""
