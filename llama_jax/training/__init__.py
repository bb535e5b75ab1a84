"""Loss, optimizer, step, loop."""
