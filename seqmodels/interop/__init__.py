"""Models from elsewhere, and ours for elsewhere."""
