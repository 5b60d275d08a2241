"""From a recipe to the parts of its run: folder, data, model, task."""

import contextlib
import multiprocessing
import multiprocessing.util
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import nn
from torch.utils.data import DataLoader

from patchscale.data.decoding import Decoder, EncodedFiles, collate_encoded
from patchscale.data.sampling import EpochSampler, ShareSampler
from patchscale.data.sources import Source, Transform, Transformed, Unreadable, collate, open_source
from patchscale.data.transforms import Preprocessing
from patchscale.errors import UserError, first_line
from patchscale.files import make_folder
from patchscale.models.adventurer import Adventurer
from patchscale.models.backbone import Backbone
from patchscale.models.published import check_model_name, evaluation_crop
from patchscale.models.tokens import grid_size
from patchscale.models.weight_files import fill, read_checkpoint
from patchscale.models.weights import difference_warning, load_weights
from patchscale.tasks import Task
from patchscale.tasks.classification import Classification
from patchscale.tasks.distillation import Distillation, Teacher
from patchscale.tasks.masked_autoencoding import MaskedAutoencoder, MaskedAutoencoding
from patchscale.train.checkpoint import load_model
from patchscale.train.device import default_workers
from patchscale.train.recipe import Recipe


def stop_signals() -> list[int]:
    """Signals that ask a run to save and end: what schedulers send before they kill, Ctrl-C, and a terminal's end.

    That last one is left out where it is ignored: nohup has a run outlive its terminal.
    """
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
    found: list[int] = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [n for n in found if signal.Signals(n).name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def open_sources(recipe: Recipe) -> tuple[Source, Source]:
    """The training and the validation images of a recipe.

    Raises:
        UserError: as :func:`open_source`, or the two have other classes.
    """
    train = open_source(recipe.data, "train", recipe.limit_train)
    val = open_source(recipe.data, "val", recipe.val_limit)
    if recipe.task == "classification" and train.classes != val.classes:
        alone = sorted(set(train.classes) ^ set(val.classes))
        what = f"{alone[0]!r} is in one of them alone" if alone else "their order differs"
        raise UserError(
            f"{recipe.data} has {len(train.classes)} classes to train on and {len(val.classes)} to evaluate on, which "
            f"are not the same: {what}"
        )
    return train, val


def model_arguments(recipe: Recipe, source: Source) -> dict[str, Any]:
    """What timm makes the recipe's model from.

    Raises:
        UserError: as :func:`size_arguments`.
    """
    given = {"flip": recipe.flip, "drop_path_rate": recipe.drop_path or None, "pos_embed": recipe.pos_embed}
    classes = len(source.classes) if recipe.task == "classification" else 0
    fixed = {"num_classes": classes, "in_chans": source.channels} | size_arguments(recipe)
    return fixed | {name: value for name, value in given.items() if value is not None}


def size_arguments(recipe: Recipe) -> dict[str, Any]:
    """Of these arguments, the sizes.

    Raises:
        UserError: several patch sizes that do not divide the image, or for a model that has but one.
    """
    sizes: dict[str, Any] = {
        "img_size": recipe.img_size,
        "patch_size": recipe.patch_size,
        "embed_dim": recipe.embed_dim,
        "depth": recipe.depth,
        "extend": recipe.extend if recipe.extend != 1 else None,
    }
    if recipe.patch_sizes:
        check_model_name(recipe.model)
        if not timm.models.is_model_in_modules(recipe.model, ("adventurer", "vit")):
            raise UserError(
                f"--patch-sizes is for models of this library, and {recipe.model} is timm's: `patchscale models` lists "
                "them (deit_base_patch16 is timm's deit_base_patch16_224)"
            )
        img_size = recipe.img_size or timm.get_pretrained_cfg(recipe.model).input_size[1:]  # type: ignore[union-attr]
        grids = {size: grid_size(img_size, size) for size in recipe.patch_sizes}
        sizes["patch_size"] = recipe.patch_size or max(grids)
        sizes["pos_grid"] = grids[min(grids)]
    return {name: value for name, value in sizes.items() if value is not None}


def create_model(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model by name, with near names where there is none such.

    Raises:
        UserError: an unknown name, or arguments that the model does not take.
    """
    check_model_name(name)
    try:
        model = timm.create_model(name, **arguments)
    except (TypeError, AssertionError) as e:
        raise UserError(f"{name} cannot be made with {arguments}: {first_line(e) or 'timm refuses them'}") from e
    if isinstance(model, Adventurer):
        arguments["flip"] = model.flip
    if isinstance(model, Backbone):
        arguments["img_size"], arguments["patch_size"] = model.patch_embed.img_size, model.patch_embed.patch_size
    return model


def recompute_blocks(model: nn.Module, keep_products: bool) -> None:
    """Turn activation checkpointing on.

    Raises:
        UserError: a model that cannot keep products.
    """
    if keep_products and not isinstance(model, Backbone):
        raise UserError(f"--keep-products is for models of this library, not {type(model).__name__}: leave it out")
    model.set_grad_checkpointing(**({"keep_products": True} if keep_products else {}))  # type: ignore[operator]


def preprocessing_for(recipe: Recipe, model: nn.Module, source: Source) -> Preprocessing:
    """How the recipe's model is fed in evaluation."""
    cfg = timm.data.resolve_model_data_config(model)
    patch_embed = getattr(model, "patch_embed", None)
    size = to_2tuple(recipe.img_size) if recipe.img_size is not None else cfg["input_size"][1:]
    size = getattr(patch_embed, "img_size", None) or size
    patch = getattr(patch_embed, "patch_size", (16, 16))
    crop = recipe.eval_crop if recipe.eval_crop is not None else evaluation_crop(max(patch), max(size))
    swaps = recipe.pixel_swaps, recipe.swap_distance
    return Preprocessing(tuple(size), source.channels, source.mean, source.std, crop, *swaps)


def start_from(model: nn.Module, recipe: Recipe, note: Callable[[str], None]) -> dict[str, str]:
    """Fill a model with the weights that the recipe starts from; a head of other classes keeps its own.

    Returns:
        What was resized and how, in words, for the run's checkpoints.

    Raises:
        UserError: as :func:`patchscale.load_weights`.
    """
    checkpoint = read_checkpoint(recipe.weights, recipe.which)  # type: ignore[arg-type]  # called where there are some
    resized = fill(model, checkpoint, strict=False, resize=recipe.resize)
    warning = difference_warning(model, checkpoint)
    if warning:
        note(warning)
    return resized


def position_arguments(model: nn.Module) -> dict[str, Any]:
    """The argument that makes a model with the same position table; weights may have moved it to another grid."""
    if not isinstance(model, Backbone):
        return {}
    return {"pos_grid": None if model.pos_grid == model.patch_embed.grid_size else model.pos_grid}


def training_transform(recipe: Recipe, preprocessing: Preprocessing) -> Transform:
    """The recipe's augmentation of single images."""
    return preprocessing.training_transform(
        recipe.crop_scale,
        recipe.hflip,
        recipe.color_jitter,
        recipe.auto_augment,
        recipe.random_erasing,
        recipe.simple_random_crop,
        recipe.grayscale,
    )


def make_decoder(recipe: Recipe, preprocessing: Preprocessing, device: torch.device, training: bool) -> Decoder | None:
    """What decodes files where the model computes, if the recipe says so."""
    if recipe.decode == "workers":
        return None
    names = ("crop_scale", "hflip", "color_jitter", "random_erasing")
    return Decoder(preprocessing, {n: getattr(recipe, n) for n in names} if training else None, device)


def trained_module(recipe: Recipe, model: nn.Module) -> nn.Module:
    """What the recipe's task trains: the model, or a module that holds it as its ``backbone``.

    Raises:
        UserError: the model is not one for the task.
    """
    if recipe.task == "classification":
        return model
    return MaskedAutoencoder(model, recipe.mask_ratio, recipe.decoder_dim, recipe.decoder_depth)


def make_task(recipe: Recipe, module: nn.Module, num_classes: int, teacher: nn.Module | None) -> Task:
    """The recipe's loss, mixing and metrics, for what :func:`trained_module` gave."""
    if isinstance(module, MaskedAutoencoder):
        return MaskedAutoencoding(module)
    distillation = None
    if teacher is not None and recipe.distillation != "none":
        distillation = Distillation(teacher, recipe.distillation, recipe.distillation_alpha, recipe.distillation_tau)
        if hasattr(module, "set_distilled_training"):  # timm's DeiT with a token for the teacher: it answers twice then
            module.set_distilled_training(True)
    return Classification(
        num_classes, recipe.smoothing, recipe.mixup, recipe.cutmix, recipe.mixup_batch, recipe.loss, distillation
    )


def make_teacher(recipe: Recipe, classes: tuple[str, ...], preprocessing: Preprocessing) -> Teacher | None:
    """The classifier that the recipe learns from, if it names one, taking the student's images.

    Raises:
        UserError: there is no such model or file, or it has other classes or channels than the data.
    """
    if recipe.teacher is None:
        return None
    model, wanted, taught = _teacher_model(recipe, len(classes), preprocessing)
    if model.num_classes != len(classes):
        raise UserError(
            f"the teacher {recipe.teacher} tells {model.num_classes} classes apart, the data has {len(classes)}: take "
            "one that was trained on this data, or give --teacher-weights of one that was"
        )
    if taught is not None and taught != classes:
        raise UserError(f"the teacher {recipe.teacher} learned other classes, or the same in another order")
    student = preprocessing.mean, preprocessing.std
    own = (wanted.mean, wanted.std) if len(wanted.mean) == preprocessing.channels else student
    patch_embed: Any = getattr(model, "patch_embed", None)
    fixed = model.pretrained_cfg.get("fixed_input_size") or getattr(patch_embed, "strict_img_size", False)
    return Teacher(model, student, own, wanted.img_size if fixed else None)


def _teacher_model(
    recipe: Recipe, num_classes: int, preprocessing: Preprocessing
) -> tuple[Any, Preprocessing, tuple[str, ...] | None]:
    """The teacher, how it is fed, and the names of its classes where they are recorded."""
    name: Any = recipe.teacher
    if not timm.is_model(name) and not name.startswith("hf-hub:") and recipe.teacher_weights is None:
        if not Path(name).exists() and "/" not in name:
            check_model_name(name)  # a name, and a wrong one
        loaded = load_model(name)
        if loaded.preprocessing.channels != preprocessing.channels:
            raise UserError(
                f"the teacher {name} takes {loaded.preprocessing.channels} channels, the data has "
                f"{preprocessing.channels}"
            )
        return loaded.model, loaded.preprocessing, loaded.classes
    arguments: dict[str, Any] = {"in_chans": preprocessing.channels}
    try:
        if recipe.teacher_weights is None:
            model = timm.create_model(name, pretrained=True, **arguments)
        else:
            model = create_model(name, arguments | {"num_classes": num_classes})
            load_weights(model, recipe.teacher_weights)
    except (OSError, RuntimeError) as e:
        raise UserError(f"the teacher {name} has no weights to be had ({first_line(e)}): give --teacher-weights") from e
    config = timm.data.resolve_model_data_config(model)
    channels, *size = config["input_size"]
    return model, Preprocessing((size[0], size[1]), channels, config["mean"], config["std"], 1.0), None


def make_loader(
    source: Source,
    transform: Transform | None,
    batch_size: int,
    workers: int | None,
    device: torch.device,
    sampler: EpochSampler | ShareSampler | None = None,
) -> DataLoader:
    """Batches of (images, labels, unreadable); those of an epoch of training without the incomplete last one.

    Without a transform, the images are files still to be decoded.
    """
    training = isinstance(sampler, EpochSampler)
    workers = default_workers(device) if workers is None else workers
    if workers:  # not atexit: that comes too late where this process is itself one of multiprocessing's
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=0)
    return _Loader(
        EncodedFiles(source) if transform is None else Transformed(source, transform),
        batch_size,
        sampler=sampler,
        drop_last=training,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_the_run,
        collate_fn=collate_encoded if transform is None else collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        persistent_workers=training and workers > 0,
        prefetch_factor=4 if workers > 0 else None,
    )


class _Loader(DataLoader):
    """Holds signals back while it starts workers: one that came before they ignore it would end them."""

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):  # Windows
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals())
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(worker: int) -> None:
    """Ctrl-C and a scheduler's signals reach every process of the group; the run decides when its workers end."""
    stopping = stop_signals()
    for number in stopping:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping)


def _end_workers() -> None:
    """After an error or a signal, workers are still there; what ends them by default is the signal they ignore."""
    if hasattr(signal, "SIGCHLD"):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch would complain of each that is killed
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def refuse_or_note(item: Unreadable, skip: bool, note: Callable[[str], None]) -> None:
    """Stop at an image that cannot be read, or say that it is left out.

    Raises:
        UserError: unless ``skip``.
    """
    if not skip:
        raise UserError(
            f"cannot read {item.path}: {item.reason}; repair or remove it, or pass --skip-unreadable to leave it out"
        )
    note(f"left out {item.path}: {item.reason}")


def run_folder(recipe: Recipe, resume: Path | None) -> Path:
    """The folder of a run, which is not made yet: a run that is refused leaves nothing behind."""
    if resume is not None:
        return resume if resume.is_dir() else resume.parent
    return recipe.output or Path("runs") / f"{recipe.model}_{time.strftime('%Y%m%d-%H%M%S')}"


def prepare_folder(folder: Path) -> None:
    """Make a run's folder, and clean it of what a killed process was writing.

    Raises:
        UserError: it cannot be written to.
    """
    make_folder(folder)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
