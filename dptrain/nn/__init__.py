"""Layers, losses and metrics, and what runs them over shards."""
