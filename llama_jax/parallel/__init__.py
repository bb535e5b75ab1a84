"""Meshes, the two sharding tables, and rows over devices."""
