"""Sentences: data sets, tokenizers, styles, and the frozen text autoencoder."""
