"""The demo: a real model, a real server, a real question, and the benchmark table."""
