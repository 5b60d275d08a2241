"""What the tokens of an image have in common, as a picture: their principal components as red, green and blue."""

import torch
from PIL import Image
from torch import Tensor


def principal_components(features: Tensor, count: int = 3) -> Tensor:
    """The first principal components over an image's tokens, each scaled to 0 to 1.

    Args:
        features: (channels, rows, columns).
        count: how many components.

    Returns:
        (count, rows, columns); components that the tokens do not have (a single token has none) are 0.5.
    """
    _, rows, columns = features.shape
    tokens = features.flatten(1).t().double()
    tokens = tokens - tokens.mean(0)
    rank = min(count, *tokens.shape)
    left, singular, _ = torch.linalg.svd(tokens, full_matrices=False)
    components = (left * singular)[:, :rank].t()
    # A component's sign is arbitrary: let its longer tail be bright.
    components = components * torch.where(components.pow(3).sum(1, keepdim=True) < 0, -1.0, 1.0)
    low, high = components.amin(1, keepdim=True), components.amax(1, keepdim=True)
    spread = high - low
    scaled = torch.where(spread > 1e-9, (components - low) / spread.clamp(min=1e-9), 0.5)
    result = torch.full((count, rows * columns), 0.5, dtype=torch.float64)
    result[:rank] = scaled
    return result.view(count, rows, columns).to(features.dtype)


def token_picture(image: Image.Image, features: Tensor, side: int = 448) -> Image.Image:
    """The image beside its tokens' principal components, laid over it, one square a token.

    Args:
        image: what the model saw, in RGB.
        features: (channels, rows, columns), tokens of one block.
        side: width of each of the two halves, in pixels.
    """
    height = round(side * image.height / image.width)
    seen = image.convert("RGB").resize((side, height), Image.Resampling.BICUBIC)
    colours = (principal_components(features) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    over = Image.fromarray(colours).resize((side, height), Image.Resampling.NEAREST)
    picture = Image.new("RGB", (2 * side, height))
    picture.paste(seen, (0, 0))
    picture.paste(Image.blend(seen, over, 0.75), (side, 0))
    return picture
