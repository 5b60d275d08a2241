"""The front door: ``patchscale COMMAND``, one thin function a command."""

import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro
from rich.table import Table

from patchscale import console
from patchscale.bench.command import Kind, Options
from patchscale.errors import INTERRUPTED, Interrupted, TrainingStopped, UserError
from patchscale.train.command import Which, evaluate, launch, train


def sweep(arguments: list[str]) -> None:
    """Train a study: every combination of patch sizes, seeds and whatever else is swept."""
    from patchscale.scaling.sweep_command import sweep as run

    run(arguments)


def predict(
    image: tyro.conf.Positional[Path],
    weights: str,
    which: Which = "model",
    flip: Literal["alternate", "pairs", "released"] | None = None,
    top: int = 5,
    features: Path | None = None,
    device: str | None = None,
) -> None:
    """Print the most likely classes of an image, and picture what its tokens have in common.

    Args:
        image: The image file.
        weights: A run's folder (its best checkpoint), a file, a URL or a Hub id.
        which: The trained weights, or their moving average.
        flip: Which blocks scan from the right, instead of the file's rule.
        top: How many classes.
        features: Write the last block's tokens as a picture here: their principal components over the image.
        device: cpu, cuda, cuda:1, mps; by default the GPU where there is one.
    """
    import torch

    from patchscale.files import make_folder, write_atomically
    from patchscale.tasks.token_picture import token_picture
    from patchscale.train.checkpoint import load_model
    from patchscale.train.device import resolve_device

    if top < 1:
        raise UserError(f"--top is {top}, expected at least 1 class")
    form = None if features is None else _picture_format(features)
    place = resolve_device(device)
    loaded = load_model(weights, which, flip)
    picture = _open_image(image, "L" if loaded.preprocessing.channels == 1 else "RGB")
    tensor = loaded.preprocessing.transform()(picture)[None].to(place)
    model = loaded.model.to(place)
    with torch.inference_mode():
        tokens, (last,) = model.forward_intermediates(tensor, 1, norm=True)
        logits = model.forward_head(tokens).float()
    if not model.num_classes and features is None:
        raise UserError(f"{weights} has no classifier: give --features FILE for its tokens, or train one from it")
    if model.num_classes:
        names = loaded.classes or _imagenet_names(logits.shape[1])
        for share, index in zip(*logits.softmax(1)[0].topk(min(top, logits.shape[1])), strict=True):
            console.out.print(f"{100 * share:6.2f}%  {names[index]}")
    if features is not None:
        make_folder(features.resolve().parent)
        shown = loaded.preprocessing.visible(picture)
        written = token_picture(shown, last[0].float().cpu())
        write_atomically(features, lambda path: written.save(path, format=form))
        console.out.print(f"wrote {features}")


def models(pattern: tyro.conf.Positional[str] = "*_224") -> None:
    """List the models, with published accuracies.

    Args:
        pattern: Names to list, such as '*' (all), '*tiny*', 'deit_base_patch1_*'.
    """
    import fnmatch

    from patchscale.models.published import FAMILIES, published_top1

    table = Table("model", "tokens", "parameters (M)", "published top-1 %")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for family in FAMILIES:
        for size, patch, img, name in family.names():
            short = not name.endswith(f"_{img}")  # shown where it is asked for, and not beside the whole name
            if fnmatch.fnmatch(name, pattern) and not (short and fnmatch.fnmatch(f"{name}_{img}", pattern)):
                top1 = published_top1(f"{name}_{img}" if short else name)
                parameters = family.count(**family.sizes[size], patch_size=patch, img_size=img) / 1e6
                tokens = (img // patch) ** 2 + 1
                table.add_row(name, f"{tokens:,}", f"{parameters:.1f}", "" if top1 is None else f"{top1:.1f}")
    if not table.rows:
        raise UserError(
            f"no model matches {pattern!r}; names look like adventurer_base_patch16_224, deit_base_patch4_64 or "
            "pixel_transformer_tiny_patch1_32"
        )
    console.out.print(table)


def convert(source: tyro.conf.Positional[str], destination: tyro.conf.Positional[Path], which: Which = "model") -> None:
    """Write weights as safetensors, with the config.json that timm and the Hugging Face Hub read.

    Args:
        source: A file, URL or Hub id.
        destination: A folder, ready for the Hub (model.safetensors), or a .safetensors file of another name.
        which: The trained weights, or their moving average.
    """
    from patchscale.models.weights import convert as run

    for path in run(source, destination, which):
        console.out.print(f"wrote {path}")


def bench(kind: tyro.conf.Positional[Kind], options: tyro.conf.OmitArgPrefixes[Options]) -> None:
    """Measure time and memory beside peers, in one run.

    Args:
        kind: Operators (ops), mixers and blocks or whole models (model), training steps (train).
        options: How.
    """
    from patchscale.bench.command import bench as run

    run(kind, options)


def fit(
    results: tyro.conf.Positional[str],
    of: Literal["loss", "error"] = "loss",
    axis: Literal["patch", "tokens", "flops"] = "patch",
    confidence: float = 0.9,
    coarse: tuple[int, ...] = (),
) -> None:
    """Fit the law of patch size to a study's results, and say how sure it is.

    Args:
        results: A file of results (.jsonl or .csv), or a study's folder; published for the papers' figures.
        of: Test loss in nats, or top-1 error in percent.
        axis: Over the patch's side in pixels, tokens, or the forward FLOPs of an image.
        confidence: Of all intervals.
        coarse: Patch sizes from which the finer ones are predicted; by default the three coarsest.
    """
    from patchscale.scaling.command import fit as run

    run(results, of, axis, confidence, coarse, console.out)


def report(
    results: tyro.conf.Positional[Path],
    out: Path = Path("report.html"),
    confidence: float = 0.9,
    data: str | None = None,
) -> None:
    """Write one page about a study that opens anywhere: law, cost, frontier, samples, settings and the data.

    Args:
        results: A file of results (.jsonl or .csv), or a study's folder.
        out: The page; its figures are written beside it as SVG and PNG.
        confidence: Of all intervals.
        data: Where to take sample images from, if not where the results say, such as cifar100:PATH.
    """
    from patchscale.scaling.report import write_report

    for path in write_report(results, out, confidence, data):
        console.out.print(f"wrote {path}")


def plan(arguments: list[str]) -> None:
    """Say what training costs at every patch size, in FLOPs, memory and time, before it is paid."""
    from patchscale.scaling.plan import Options
    from patchscale.scaling.plan_report import show_plan
    from patchscale.train.device import keep_freed_memory

    options = tyro.cli(Options, args=arguments, prog="patchscale plan", description=plan.__doc__)
    keep_freed_memory()
    with console.err.status("") as status:
        show_plan(options, console.print_whole, status.update)


def env() -> None:
    """Print versions, devices, and the implementation that each operator will use and why."""
    from importlib.metadata import version

    import torch

    from patchscale import ops
    from patchscale.ops import native
    from patchscale.ops.dispatch import choose_implementation
    from patchscale.ops.linear import mkl_is_slow
    from patchscale.train.device import resolve_device

    device = resolve_device(None)
    table = Table.grid(padding=(0, 2))
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    for package in ("patchscale", "torch", "torchvision", "timm"):
        table.add_row(package, version(package))
    table.add_row("threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    table.add_row("default device", str(device))
    refusal = None
    try:
        choice = choose_implementation(None, device)
        operators = f"{choice.implementation} ({choice.reason})"
    except UserError as e:
        refusal, operators = e, "none, see below"
    for name in ops.DISPATCHED:
        table.add_row(name, operators)
    table.add_row("gated_rms_norm", "torch (the only one)")
    library = "oneDNN, as MKL leaves this processor's AVX-512 unused" if mkl_is_slow() else "PyTorch's default"
    table.add_row("linear layers", f"float32 on CPUs: {library}")
    obstacle = native.available(torch.device("cpu"))
    table.add_row("native kernels", f"for CPUs, with PATCHSCALE_OPS=native: {obstacle or 'ready'}")
    console.out.print(table)
    if refusal is not None:
        raise refusal


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "launch": launch,
    "sweep": sweep,
    "eval": evaluate,
    "predict": predict,
    "models": models,
    "convert": convert,
    "bench": bench,
    "plan": plan,
    "fit": fit,
    "report": report,
    "env": env,
}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0, 1 when training cannot go on, 2 for bad input, 75 when training was told to stop and has saved, 130 when
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if not arguments or arguments[0] in ("-h", "--help"):
        console.out.print(_usage())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    try:
        if command not in COMMANDS:
            raise UserError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        if command in ("train", "launch", "sweep", "plan"):
            COMMANDS[command](rest)
        else:
            tyro.cli(COMMANDS[command], args=rest, prog=f"patchscale {command}")
        return 0
    except UserError as e:
        return _fail(str(e), 2)
    except TrainingStopped as e:
        return _fail(str(e), 1)
    except Interrupted as e:
        return _fail(str(e), INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _usage() -> str:
    lines = [f"  {name:<9}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "Vision models at any patch size, down to a single pixel.",
            "",
            "patchscale COMMAND ...",
            *lines,
            "",
            "patchscale COMMAND --help",
        ]
    )


def _fail(message: str, status: int) -> int:
    console.err.print(f"patchscale: {message}")
    return status


def _open_image(path: Path, mode: str):
    from PIL import Image

    from patchscale.data.sources import in_mode

    try:
        with Image.open(path) as image:
            return in_mode(image, mode)
    except FileNotFoundError as e:
        raise UserError(f"no such image: {path}") from e
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise UserError(f"cannot read {path} as an image: {e}") from e


def _picture_format(path: Path) -> str:
    from PIL import Image

    form = Image.registered_extensions().get(path.suffix.lower() or ".png")
    if form not in Image.SAVE:
        raise UserError(f"cannot write a picture as {path.name}: end the name in .png, .jpg or .webp")
    return form


def _imagenet_names(num_classes: int) -> list[str]:
    from timm.data import ImageNetInfo

    if num_classes != 1000:
        return [f"class {i}" for i in range(num_classes)]
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(1000)]


if __name__ == "__main__":
    sys.exit(main())
