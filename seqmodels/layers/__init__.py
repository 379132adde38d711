"""Layers around the mixers: norms, gates, dropout, embeddings."""
