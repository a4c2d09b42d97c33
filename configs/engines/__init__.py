"""Which engine attends, measured per compute capability."""
