"""All of a training run, in one dataclass; each field is a flag of ``patchscale train``."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from patchscale.errors import UserError
from patchscale.models.backbone import Positions
from patchscale.models.tokens import Resize
from patchscale.models.weight_files import Which
from patchscale.tasks import Loss

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
Strategy = Literal["auto", "ddp", "fsdp"]


# A run may go on with other values of these: another machine, the same result.
_WHERE_AND_HOW = {
    "output", "device", "devices", "nodes", "strategy", "device_batch", "workers", "grad_checkpointing",
    "keep_products", "skip_unreadable", "trackers", "save_minutes", "keep_epochs",
}  # fmt: skip

# What masked autoencoding has no use for, and what it is where it is not used.
_NOT_WITHOUT_LABELS = {"mixup": 0.0, "cutmix": 0.0, "teacher": None, "patch_sizes": (), "extend": 1}


@dataclass(frozen=True)
class Recipe:
    """A training run, or one stage of a run of several. Sizes in pixels."""

    model: str
    """A name that `patchscale models` lists, or any other timm model."""
    data: str
    """digits, cifar10:PATH, cifar100:PATH, inat:PATH (iNaturalist 2021), folder:PATH, or a name timm knows (hfds/NAME,
    wds/NAME:PATH, torch/NAME:PATH)."""
    img_size: int | tuple[int, int] | None = None
    """Image size the model is made for; by default the one in its name."""
    patch_size: int | tuple[int, int] | None = None
    """Patch size; by default the one in its name."""
    patch_sizes: tuple[int, ...] = ()
    """One model for several patch sizes: each step draws one of these. The patch embedding is kept at patch_size, by
    default the largest of them, and resized in passing; positions are kept on the grid of the smallest."""
    extend: int = 1
    """Interpolate the tokens to so many times the rows and columns: as many as smaller patches give, with no more to
    see (the control of Scaling Laws in Patchification, Table 5)."""
    embed_dim: int | None = None
    """Width; by default the model's."""
    depth: int | None = None
    """Blocks; by default the model's."""
    flip: Literal["alternate", "pairs", "released"] | None = None
    """Which blocks scan from the right; by default every second one."""
    pos_embed: Positions | None = None
    """How tokens know their place: learned positions (the default), fixed sines and cosines, or not at all; for an
    Adventurer, beside the order of its scan."""
    drop_path: float = 0.0
    """Stochastic depth."""
    weights: str | None = None
    """Start from these weights (a file, URL or Hub id); patches and positions are resized to fit."""
    which: Which = "model"
    """Start from the trained weights in that file, or from their moving average."""
    resize: Resize = "correct"
    """Positions are resized rightly, or as the published code does, which takes the first of them for the class
    token's although it is the last."""
    limit_train: int | None = None
    """Train on this many images, a fixed random sample."""
    limit_val: int | None = None
    """Evaluate on this many; by default as many as limit_train where that is given, else all. 0 for all."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read, instead of stopping."""

    task: Literal["classification", "masked-autoencoding"] = "classification"
    """masked-autoencoding: paint hidden patches, without labels, for weights to start a classifier from."""
    mask_ratio: float = 0.75
    """Share of the patches that are hidden."""
    decoder_dim: int | None = None
    """Width of what paints them, a multiple of 32; by default half of the model's."""
    decoder_depth: int = 8
    """Its blocks."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's share of the image's area."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    simple_random_crop: bool = False
    """Instead of that crop: resize to the image size, pad 4 pixels by reflection, crop at random."""
    auto_augment: str | None = None
    """timm's name of a policy: 3a for 3-Augment, rand-m9-mstd0.5-inc1 for RandAugment."""
    color_jitter: float = 0.0
    """Strength of colour jitter (published with 3-Augment: 0.3; RandAugment replaces it)."""
    grayscale: float = 0.0
    """Probability of losing all colour."""
    random_erasing: float = 0.0
    """Probability of erasing a rectangle."""
    pixel_swaps: int = 0
    """Pairs of pixels that change places, the same ones in every image, in evaluation too: how much does the model need
    what is near to stay near?"""
    swap_distance: int | None = None
    """How many rows and columns the two may be apart; by default any."""
    repeated_aug: int = 1
    """Draw each image this many times in a row, and accordingly fewer images an epoch (published: 3)."""
    mixup: float = 0.0
    """Alpha of mixup (published: 0.8)."""
    cutmix: float = 0.0
    """Alpha of cutmix (published: 1)."""
    mixup_batch: int | None = None
    """Images mixed among themselves with one draw (published: each GPU's batch); by default all of a step."""
    smoothing: float = 0.1
    """Label smoothing."""
    loss: Loss = "cross-entropy"
    """bce: binary cross entropy for each class, where every class of a mixed image counts in full."""
    teacher: str | None = None
    """Learn from this classifier too: a timm model with its published weights, or a file or run of this library."""
    teacher_weights: str | None = None
    """Weights for the timm model that --teacher names, instead of its published ones."""
    distillation: Literal["none", "soft", "hard"] = "none"
    """Learn the teacher's probabilities (soft) or its most likely class (hard)."""
    distillation_alpha: float = 0.5
    """The teacher's share of the loss."""
    distillation_tau: float = 1.0
    """Temperature of soft distillation."""
    eval_crop: float | None = None
    """Share of the image that evaluation's centre crop keeps; by default as published for the size, 1 up to 32 px."""

    epochs: int = 100
    """Passes over the training images."""
    global_batch: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 64
    """Images an optimiser step, over all devices: the result does not depend on how many there are."""
    device_batch: int | None = None
    """Most images that a device takes at once; more are done in parts, for less memory. By default no limit."""
    lr: float = 1e-3
    """Peak learning rate."""
    unscale_lr: bool = True
    """Take lr as it is; if not, it is stated for 512 images a step and scaled with global_batch (as published)."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine; never scaled."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up; never scaled."""
    warmup_epochs: float | None = None
    """Length of the warm-up; by default 5 epochs, or a tenth of a shorter run."""
    schedule: Literal["step", "published"] = "step"
    """Rates follow the cosine step by step, or epoch by epoch and one epoch late, as the published code does."""
    layer_decay: float = 1.0
    """Each block learns at this share of the next one's rate."""
    weight_decay: float = 0.05
    """AdamW's, on matrices and kernels alone (as published)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    clip_grad: float | None = None
    """Largest norm of all gradients together; by default none."""
    freeze: tuple[str, ...] = ()
    """Parameters not to train, by name with wildcards: 'patch_embed.*' 'layers.[0-3].*'."""
    ema_decay: float | None = None
    """Keep and evaluate an average of the weights with this decay a step (published: 0.99996)."""

    precision: Precision = "32-true"
    """bf16-mixed computes matrix products in bfloat16, 16-mixed in float16 with scaled losses (GPU alone); 64-true
    everything in float64, for proofs."""
    device: str | None = None
    """cpu, cuda, cuda:1, mps; by default the GPU where there is one."""
    devices: int | None = None
    """Processes on each node, a device each; by default what torchrun or Slurm started, else 1."""
    nodes: int | None = None
    """Machines; by default what torchrun or Slurm started, else 1."""
    strategy: Strategy = "auto"
    """ddp keeps all weights on every device, fsdp divides them; auto is ddp where there are several."""
    decode: Literal["workers", "device"] = "workers"
    """device: JPEG files are decoded, cropped and normalised on the GPU; the images differ a little."""
    workers: int | None = None
    """Processes that read images; by default as many as help."""
    seed: int = 0
    """Of the weights, the order of images and the augmentation."""
    grad_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, more time."""
    keep_products: bool = False
    """With grad_checkpointing, keep what linear layers computed: between the two in memory and time."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Where metrics go beside metrics.jsonl: tensorboard, wandb, mlflow, trackio."""
    save_minutes: float = 10.0
    """Write the last checkpoint at least this often, within an epoch too."""
    keep_epochs: int | None = None
    """Keep the checkpoint of every so many epochs; by default the last and the best alone."""
    output: Path | None = None
    """Folder of the run; by default a new one under runs/. One that holds this run already goes on."""

    def __post_init__(self) -> None:
        counts = ("epochs", "global_batch", "device_batch", "repeated_aug", "devices", "nodes", "keep_epochs")
        for name in (*counts, "extend", "lr", "layer_decay", "decoder_depth", "distillation_tau"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{_flag(name)} is {value}, expected more than 0")
        for name in (
            "seed",
            "workers",
            "min_lr",
            "warmup_lr",
            "warmup_epochs",
            "weight_decay",
            "mixup",
            "cutmix",
            "color_jitter",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{_flag(name)} is {value}, expected 0 or more")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas is {self.betas[0]} {self.betas[1]}, expected 0 up to but not including 1, both")
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise UserError(f"--crop-scale is {low} {high}, expected 0 < low <= high <= 1")
        for name in ("hflip", "drop_path", "layer_decay", "random_erasing", "grayscale", "distillation_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}, expected 0 to 1")
        if any(size < 1 for size in self.patch_sizes):
            raise UserError(f"--patch-sizes is {' '.join(map(str, self.patch_sizes))}, expected pixels, 1 or more each")
        if self.extend > 1 and self.patch_sizes:
            raise UserError("--extend is for one patch size: leave out --patch-sizes")
        if self.pixel_swaps < 0 or (self.swap_distance is not None and self.swap_distance < 1):
            given = f"--pixel-swaps is {self.pixel_swaps} and --swap-distance {self.swap_distance}"
            raise UserError(f"{given}, expected 0 or more, and 1 or more")
        if self.swap_distance is not None and not self.pixel_swaps:
            raise UserError("--swap-distance is for --pixel-swaps: give both")
        if not 0 < self.mask_ratio < 1:
            raise UserError(f"--mask-ratio is {self.mask_ratio}, expected between 0 and 1")
        if self.task == "masked-autoencoding":
            for name, off in _NOT_WITHOUT_LABELS.items():
                if getattr(self, name) != off:
                    raise UserError(f"{_flag(name)} does not go with --task masked-autoencoding: leave it out")
        if (self.distillation == "none") != (self.teacher is None):
            raise UserError(
                f"--distillation is {self.distillation} and --teacher is {self.teacher}: learning from a teacher needs "
                "--distillation soft or hard, and --teacher NAME"
            )
        if self.eval_crop is not None and not 0 < self.eval_crop <= 1:
            raise UserError(f"--eval-crop is {self.eval_crop}, expected more than 0, up to 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"--ema-decay is {self.ema_decay}, expected between 0 and 1")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UserError(f"--clip-grad is {self.clip_grad}, expected more than 0; leave it out for none")
        if self.decode == "device" and (self.auto_augment or self.simple_random_crop or self.grayscale):
            raise UserError("--auto-augment, --simple-random-crop and --grayscale need --decode workers")
        if self.keep_products and not self.grad_checkpointing:
            raise UserError("--keep-products is a way of --grad-checkpointing: give both")
        if not self.save_minutes >= 0:
            raise UserError(f"--save-minutes is {self.save_minutes}, expected 0 (after every step) or more")

    @property
    def val_limit(self) -> int | None:
        """How many images are evaluated on, None for all."""
        return self.limit_train if self.limit_val is None else self.limit_val or None

    def changes(self, other: "Recipe") -> dict[str, tuple[Any, Any]]:
        """The fields on which the result depends and that another recipe has otherwise: (here, there) by name."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {k: (mine[k], theirs[k]) for k in mine if k not in _WHERE_AND_HOW and mine[k] != theirs[k]}

    @property
    def images_at_once(self) -> int:
        """How many images a single device takes at once."""
        return min(self.global_batch, self.device_batch or self.global_batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and checkpoints."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """What :meth:`to_dict` gave.

        Raises:
            UserError: a field that this version does not know, or a value of another type.
        """
        hints = get_type_hints(cls)
        unknown = values.keys() - hints.keys()
        if unknown:
            raise UserError(f"the recipe has unknown fields: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            if not fits(value, hints[name]):
                raise UserError(f"the recipe's {name} is {value!r}; see {_flag(name)} in `patchscale train --help`")
        restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if restored.get("output") is not None:
            restored["output"] = Path(restored["output"])
        return cls(**restored)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value, as JSON and TOML give it, is of a field's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(kinds) and all(map(fits, value, kinds))
    if hint is NoneType:
        return value is None
    if hint in (int, float) and isinstance(value, bool):
        return False
    accepted = {float: (int, float), Path: (str, Path)}.get(hint, hint)
    return isinstance(value, accepted)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
