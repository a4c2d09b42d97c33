"""Attention of one query per item over its selection."""
