"""Attention of several queries per item over the selection they share."""
