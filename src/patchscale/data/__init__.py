"""Data sets, named in one string, and how their images become tensors."""
