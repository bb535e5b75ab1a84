"""Meshes and the two sharding tables."""
