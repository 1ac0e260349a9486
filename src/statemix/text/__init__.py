"""Text as tokens: the tokenizers, and what is read and cached of a source."""
