"""Text to token ids and back: tokenizers with one protocol, chat templates."""
