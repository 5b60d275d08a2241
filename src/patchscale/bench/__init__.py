"""Measuring: this project beside its peers, on the same work, in one run.

Needs PyTorch, timm and NumPy alone; rich, matplotlib and the peers are used where they are installed. Hence
``python -m patchscale.bench`` works on a machine that has no more than that.
"""
