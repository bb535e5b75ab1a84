"""Text to token ids and back: tokenizers behind one protocol, chat templates."""
