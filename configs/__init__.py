"""Presets and benchmark definitions, shipped as data."""
