"""Folders that are filled shard by shard: latents and pairs. Killed at any moment, a second call completes them."""
