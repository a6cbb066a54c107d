"""Weights of others, in their own formats, become folders that flowmap reads. Nothing in a pickle is executed."""
