"""The programs: one file a verb."""
