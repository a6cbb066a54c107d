"""The mathematics of flow maps, in plain torch: no nn.Module, no files."""
