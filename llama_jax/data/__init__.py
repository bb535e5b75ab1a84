"""Text to batches: corpus, token file, packed batches as a pure function of (seed, step)."""
