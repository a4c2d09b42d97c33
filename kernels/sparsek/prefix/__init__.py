"""Thresholds and expiry times of all prefixes in one pass."""
