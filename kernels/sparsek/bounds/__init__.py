"""Bounds of the keys of every unit, and selection by the query."""
