"""Vision models at any patch size, down to a single pixel."""

from patchscale import models as models  # registers the models with timm
