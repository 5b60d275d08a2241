"""Backbones. Importing this package registers them with timm."""

from patchscale.models.adventurer import Adventurer
from patchscale.models.vit import ViT

__all__ = ["Adventurer", "ViT"]
