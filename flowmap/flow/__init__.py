"""Floor 0: the mathematics of flow maps. torch only; no nn.Module, no files."""
