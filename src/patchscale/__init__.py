"""Vision models at any patch size, down to a single pixel."""

from importlib.metadata import PackageNotFoundError, version

from patchscale import models as models  # registers the models with timm
from patchscale.errors import UserError
from patchscale.models.weight_files import read_checkpoint
from patchscale.models.weights import convert, create_from_checkpoint, load_weights

try:
    __version__ = version("patchscale")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0"

__all__ = ["UserError", "convert", "create_from_checkpoint", "load_weights", "read_checkpoint"]
