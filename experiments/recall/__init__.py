"""Recall, copying, state tracking and counting on synthetic tasks, at many lengths."""
