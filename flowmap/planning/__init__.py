"""What a recipe needs, what it costs, and where each part of it comes from: all that can be known before anything runs."""
