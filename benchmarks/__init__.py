"""Speed and memory, measured: one script a claim."""
