"""Masked autoencoding: most patches of an image are hidden, and the model paints them from the few that it sees.

- *Masked Autoencoders Are Scalable Vision Learners* (MAE), arXiv 2111.06377: the method, and its decoder
- *An Image is Worth More Than 16x16 Patches*, arXiv 2406.09415, section on MAE: the same with single pixels as tokens

No labels are needed. What is kept of it is the encoder, which goes on to classification.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.vision_transformer import Block as TransformerBlock
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from patchscale.errors import UserError
from patchscale.models.adventurer import Adventurer
from patchscale.models.backbone import Backbone
from patchscale.models.block import NORM_EPS
from patchscale.models.block import Block as ScanBlock
from patchscale.models.tokens import Size, grid_size, sincos_positions
from patchscale.tasks import Batches

HEAD_CHANNELS = 32
"""Of an attention head of the decoder (MAE: 512 in 16 heads)."""
EPS = 1e-6
"""Added to a patch's variance (MAE's published code)."""
_SHOWN_SIDE = 128
_GREY = 0.5


@dataclass(frozen=True)
class ReconstructionScores:
    """Mean squared error over the hidden pixels, in standard deviations of their patches, over a number of images."""

    loss: float
    images: int

    @property
    def quality(self) -> float:
        return -self.loss

    def to_row(self) -> dict[str, float]:
        return {"val_loss": self.loss}

    def __str__(self) -> str:
        return f"reconstruction loss {self.loss:.4f} over {self.images:,} images"


def patch_values(images: Tensor, patch_size: Size) -> Tensor:
    """The pixels of each patch: (n, channels, height, width) -> (n, patches, channels * patch height * patch width)."""
    rows, columns = grid_size((images.shape[2], images.shape[3]), patch_size)
    cut = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # n, channels, rows, height, columns, width
    return cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def from_patch_values(values: Tensor, grid: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patch_values`: (n, patches, values) -> (n, channels, height, width)."""
    cut = values.unflatten(2, (-1, *patch_size)).unflatten(1, grid)  # n, rows, columns, channels, height, width
    return cut.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def patch_statistics(values: Tensor, patch_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which each patch's pixels are normalised, (n, patches, 1) each.

    As in MAE's published code: over all values of the patch, the variance with n - 1, plus ``EPS``. A patch of a single
    pixel has nothing to be normalised by: 0 and 1, so that its target is the pixel as the model is fed it.
    """
    if math.prod(patch_size) == 1:
        return torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])
    return values.mean(2, keepdim=True), (values.var(2, keepdim=True) + EPS).sqrt()


class Decoder(nn.Module):
    """Paints hidden patches: light blocks of the encoder's own kind over all tokens of an image.

    Attention for a vision transformer; for Adventurer the scan, so that the cost stays linear in the tokens. Positions
    are fixed sines and cosines (MAE), whatever the encoder's are: a decoder that did not know which patch it paints
    would paint all alike.

    Args:
        backbone: the encoder.
        dim: width, a multiple of 32; by default half of the encoder's (MAE: 512 of 1024), rounded up to one.
        depth: blocks.

    Raises:
        UserError: another ``dim``.
    """

    def __init__(self, backbone: Backbone, dim: int | None, depth: int) -> None:
        super().__init__()
        if dim is None:
            dim = math.ceil(backbone.embed_dim / 2 / HEAD_CHANNELS) * HEAD_CHANNELS
        if dim < 1 or dim % HEAD_CHANNELS:
            raise UserError(f"--decoder-dim is {dim}, expected a multiple of {HEAD_CHANNELS}")
        self.prefix, self.suffix = backbone.num_prefix_tokens, backbone.num_suffix_tokens
        self.embed = nn.Linear(backbone.embed_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks: nn.Sequential
        if isinstance(backbone, Adventurer):
            self.blocks = nn.Sequential(*(ScanBlock(dim, 64, 64, 2, i % 2 == 1, 0.0) for i in range(depth)))
            self.norm: nn.Module = nn.RMSNorm(dim, eps=NORM_EPS)
        else:
            heads = dim // HEAD_CHANNELS
            self.blocks = nn.Sequential(*(TransformerBlock(dim, heads, qkv_bias=True) for _ in range(depth)))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, backbone.patch_embed.proj.weight[0].numel())
        self.register_buffer("positions", sincos_positions(backbone.patch_embed.grid_size, dim), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor, order: Tensor, hidden: Tensor) -> Tensor:
        """Paint.

        Args:
            features: the encoder's, of the visible patches and the class token.
            order: (batch, patches), every patch of an image by its number, the visible ones first, as they come.
            hidden: (batch, hidden), which to paint.

        Returns:
            (batch, hidden, values of a patch).
        """
        x = self.embed(features)
        end = x.shape[1] - self.suffix
        first, visible, last = x[:, : self.prefix], x[:, self.prefix : end], x[:, end:]
        masks = self.mask_token.to(x.dtype).expand(len(x), hidden.shape[1], -1)
        # Back into reading order: where in the shuffled tokens each patch is.
        back = order.argsort(1)[..., None].expand(-1, -1, x.shape[2])
        patches = torch.cat([visible, masks], dim=1).gather(1, back) + self.positions
        x = self.norm(self.blocks(torch.cat([first, patches, last], dim=1)))[:, self.prefix :]
        return self.predict(x.gather(1, hidden[..., None].expand(-1, -1, x.shape[2])))


class MaskedAutoencoder(nn.Module):
    """An encoder that is shown some of an image's patches, and a decoder that paints the others.

    The encoder runs on the visible tokens alone, at a quarter of the cost or less where three quarters are hidden. They
    come in reading order, so an Adventurer scans a shortened sequence, in both directions. What is lost there: gaps
    leave no trace but in the position embeddings. The convolution joins patches that are not neighbours, the state
    decays with the visible patches and not with the distance between them, and the average that opens each scan is that
    of the visible tokens. An encoder so trained meets its first whole image in fine-tuning.

    Args:
        backbone: the encoder, without a head.
        mask_ratio: share of the patches that are hidden, the same number in every image (MAE, and arXiv 2406.09415:
            0.75).
        decoder_dim: as in :class:`Decoder`.
        decoder_depth: blocks of the decoder (MAE: 8).

    Raises:
        UserError: a ``mask_ratio`` outside (0, 1), or one that leaves none of the patches visible, or none hidden; a
            model that is not of this library, or leaves out or interpolates patches itself.
    """

    def __init__(
        self, backbone: nn.Module, mask_ratio: float = 0.75, decoder_dim: int | None = None, decoder_depth: int = 8
    ) -> None:
        super().__init__()
        if not isinstance(backbone, Backbone):
            raise UserError(
                f"masked autoencoding is for models of this library, not timm's {type(backbone).__name__}: `patchscale "
                "models` lists them"
            )
        if backbone.patch_embed.extend != 1 or not backbone.patch_embed.strict_img_size:
            raise UserError(
                "masked autoencoding takes images of one size and a token for each patch: leave out extend "
                "and dynamic_img_size"
            )
        if not isinstance(getattr(backbone, "patch_drop", nn.Identity()), nn.Identity):
            raise UserError("masked autoencoding leaves out patches by itself: leave out patch_drop_rate")
        if not 0 < mask_ratio < 1:
            raise UserError(f"--mask-ratio is {mask_ratio}, expected between 0 and 1")
        if decoder_depth < 1:
            raise UserError(f"--decoder-depth is {decoder_depth}, expected at least 1")
        self.sizes = backbone.patch_embed.img_size, backbone.patch_embed.patch_size
        rows, columns = backbone.patch_embed.grid_size
        self.patches = rows * columns
        self.kept = round(self.patches * (1 - mask_ratio))
        if not 0 < self.kept < self.patches:
            raise UserError(
                f"--mask-ratio {mask_ratio} leaves {self.kept} of the image's {rows}x{columns} patches visible: some "
                "must be, and some not; take a larger image, a smaller patch or another ratio"
            )
        self.backbone = backbone
        self.decoder = Decoder(backbone, decoder_dim, decoder_depth)

    @property
    def blocks(self) -> nn.Sequential:
        """The encoder's: what is divided over processes one by one."""
        return self.backbone.trunk()[0]

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, beside those of one dimension, that weight decay skips."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()} | {"decoder.mask_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into depth groups, for layer decay; last norm and decoder decay least."""
        return {
            "stem": r"^backbone\.(?!blocks|layers|norm\.|norm_f\.)",
            "blocks": r"^backbone\.(?:blocks|layers)\.(\d+)",
        }

    def forward(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hide some patches and paint them.

        Args:
            images: (batch, channels, height, width).
            noise: (batch, patches): those with the lowest numbers stay visible; drawn here if None.

        Returns:
            What was painted (batch, hidden, values of a patch), normalised by :func:`patch_statistics`, and which
            patches these are, (batch, hidden), in reading order.

        Raises:
            UserError: the encoder was given another size after this was made.
        """
        sizes = self.backbone.patch_embed.img_size, self.backbone.patch_embed.patch_size
        if sizes != self.sizes:
            made, now = (f"images of {image} in patches of {patch}" for image, patch in (self.sizes, sizes))
            raise UserError(
                f"this decoder was made for {made}, the encoder takes {now} now: call set_input_size on the encoder "
                "first, then make the MaskedAutoencoder"
            )
        if noise is None:
            noise = torch.rand(len(images), self.patches, device=images.device)
        shuffled = noise.argsort(1)
        visible, hidden = shuffled[:, : self.kept].sort(1)[0], shuffled[:, self.kept :].sort(1)[0]
        features = self.backbone.forward_features(images, visible=visible)
        return self.decoder(features, torch.cat([visible, hidden], dim=1), hidden), hidden


class MaskedAutoencoding:
    """The training loss and the evaluation of a masked autoencoder.

    Labels are not looked at, but for the -1 of an image that does not count.

    Args:
        model: whose patches are hidden.
    """

    scores_type = ReconstructionScores

    def __init__(self, model: MaskedAutoencoder) -> None:
        patch_embed = model.backbone.patch_embed
        self.patch_size, self.grid, self.patches = patch_embed.patch_size, patch_embed.grid_size, model.patches

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images, and the noise (n, patches) that decides which of their patches are hidden."""
        # On the CPU, so that a seed hides the same patches on every device.
        return images, torch.rand(len(images), self.patches).to(images.device)

    def loss(self, model: Callable[..., Any], images: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error over the hidden pixels, normalised patch by patch (MAE, section 3)."""
        return self._errors(model, images, targets).mean()

    def _errors(self, model: Callable[..., Any], images: Tensor, noise: Tensor) -> Tensor:
        """Of each image, (n,)."""
        painted, hidden = model(images, noise)
        painted = painted.to(torch.promote_types(painted.dtype, torch.float32))
        values = patch_values(images.to(painted.dtype), self.patch_size)
        mean, std = patch_statistics(values, self.patch_size)
        target = ((values - mean) / std).gather(1, hidden[..., None].expand(-1, -1, values.shape[2]))
        return F.mse_loss(painted, target, reduction="none").mean((1, 2))

    def _fixed_noise(self, images: Tensor) -> Tensor:
        """The same patches of every image, every time."""
        noise = torch.rand(1, self.patches, generator=torch.Generator().manual_seed(0))
        return noise.to(images.device).expand(len(images), -1)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batches: Batches) -> ReconstructionScores:
        """Score a masked autoencoder, in evaluation mode, with the same patches hidden in every image, every time.

        With several processes, each gives its share of the images, in as many batches as the others; all get the scores
        over all images.

        Raises:
            UserError: there is no image.
        """
        training = model.training
        model.eval()
        # A NaN is part of the mean: torchmetrics would leave it out.
        mean_loss = MeanMetric(nan_strategy="disable").set_dtype(torch.float64)
        seen = SumMetric().set_dtype(torch.float64)
        for images, labels in batches:
            errors = self._errors(model, images, self._fixed_noise(images))[labels >= 0]
            for metric in (mean_loss, seen):
                metric.to(errors.device)
            if len(errors):
                mean_loss.update(errors)
            seen.update(float(len(errors)))
        model.train(training)
        for metric in (mean_loss, seen):
            metric._update_count = max(metric._update_count, 1)  # a share without images is no reason to warn
        images_seen = int(seen.compute())
        if not images_seen:
            raise UserError("there is no readable image to evaluate on")
        return ReconstructionScores(mean_loss.compute().item(), images_seen)

    @torch.inference_mode()
    def picture(self, model: nn.Module, images: Tensor, mean: Any, std: Any) -> Image.Image:
        """Images one below the other: each as it is, what the encoder sees of it, and with its hidden patches painted.

        The model paints patches less their own mean and contrast, which are put back here from the image itself; of
        single pixels it paints all.
        """
        training = model.training
        model.eval()
        painted, hidden = model(images, self._fixed_noise(images))
        model.train(training)
        images, painted = images.float().cpu(), painted.float().cpu()
        values = patch_values(images, self.patch_size)
        where = hidden.cpu()[..., None].expand(-1, -1, values.shape[2])
        averages, deviations = (s.expand_as(values).gather(1, where) for s in patch_statistics(values, self.patch_size))
        channel_mean, channel_std = (torch.tensor(v)[:, None, None] for v in (mean, std))
        grey = patch_values(((_GREY - channel_mean) / channel_std).expand_as(images), self.patch_size).gather(1, where)
        columns = [images]
        for shown in (grey, painted * deviations + averages):
            columns.append(from_patch_values(values.scatter(1, where, shown), self.grid, self.patch_size))
        pixels = (torch.stack(columns, dim=1) * channel_std + channel_mean).clamp(0, 1)
        scale = max(1, round(_SHOWN_SIDE / images.shape[3]))
        pixels = F.pad(pixels.repeat_interleave(scale, 3).repeat_interleave(scale, 4), (2, 2, 2, 2), value=1.0)
        sheet = pixels.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # height, width, channels
        array = (sheet * 255).round().to(torch.uint8).numpy()
        return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
