"""Token scores into the paged score cache."""
