"""Meshes, the two sharding tables, and sequences over devices."""
