"""Sequence-sharded programs on chips that are not there."""
