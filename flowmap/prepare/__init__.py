"""Fill folders of latents and of pairs shard by shard; after an interruption, a second call completes them."""
