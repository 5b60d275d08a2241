"""Backbones. Importing this package registers them with timm."""

from patchscale.models.adventurer import Adventurer

__all__ = ["Adventurer"]
