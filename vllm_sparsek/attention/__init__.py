"""The attention backend: capabilities, metadata, implementation."""
