"""Students as users have them: their folders and calls, the models stored next to their weights, and LoRAs merged into
them.
"""
