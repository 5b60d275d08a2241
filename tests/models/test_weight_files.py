"""Weight files are read whole or refused in words, run nobody's code, and are written whole or not at all."""

import argparse
import collections
import contextlib
import functools
import http.server
import os
import pathlib
import pickle
import random
import re
import threading

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from patchscale import UserError, create_from_checkpoint, load_weights, read_checkpoint
from patchscale.files import make_folder, write_atomically
from patchscale.models import Adventurer
from patchscale.models.weight_files import download, fill


def small(**kwargs) -> Adventurer:
    return Adventurer(**{"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2} | kwargs)


@pytest.fixture
def no_network(monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)


@pytest.mark.parametrize("which", ["model", "ema"])
def test_published_checkpoint(which, parity, assert_near):
    expected = load_file(parity("checkpoint_official.expect.safetensors"))
    checkpoint = read_checkpoint(parity("checkpoint_official.pth"), which)
    model = create_from_checkpoint(checkpoint).eval()
    assert_near(model(expected["input.image"]), expected[f"out.logits_{which}"], 1e-5)
    if which == "model":
        assert_near(model.double()(expected["input.image"].double()), expected["out.logits_model_f64"], 1e-9)
    assert checkpoint.flip == model.flip == "released"
    assert checkpoint.extra["epoch"] == 2
    assert "model_ema" not in checkpoint.extra


@pytest.mark.skipif(os.name == "nt", reason="Windows has no PosixPath to write")
def test_published_checkpoint_of_a_slurm_run(tmp_path, parity):
    """There a path is among the arguments, the average may be None and the scaler a word."""
    content = torch.load(parity("checkpoint_official.pth"), weights_only=False)
    content["args"].output_dir = pathlib.PosixPath("/checkpoint/user")
    content |= {"model_ema": None, "scaler": "none"}
    torch.save(content, tmp_path / "slurm.pth")
    assert b"PosixPath" in (tmp_path / "slurm.pth").read_bytes()
    checkpoint = read_checkpoint(tmp_path / "slurm.pth")
    assert checkpoint.extra["args"].output_dir == pathlib.PosixPath("/checkpoint/user")
    assert torch.equal(checkpoint.weights["cls_token"], content["model"]["cls_token"])
    with pytest.raises(UserError, match="no 'ema' weights; it has 'model'"):
        read_checkpoint(tmp_path / "slurm.pth", "ema")


@pytest.mark.parametrize(
    ("content", "flip"),
    [
        (lambda state: state, None),
        (lambda state: {"model": state}, None),
        (lambda state: {"model": state, "args": argparse.Namespace(lr=1.0)}, "released"),
        (lambda state: {"state_dict": state, "epoch": 3}, None),
        (lambda state: {f"module.{k}": v for k, v in state.items()}, None),
        (lambda state: {f"_orig_mod.module.{k}": v for k, v in state.items()}, None),
        (lambda state: {re.sub(r"(layers\.\d\.)", r"\1_orig_mod.", k): v for k, v in state.items()}, None),
    ],
    ids=["bare", "model", "published", "timm", "data parallel", "compiled", "blocks compiled"],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts_of_checkpoints(content, flip, zipped, tmp_path):
    state = small().state_dict()
    torch.save(content(state), tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "file.pth")
    assert checkpoint.flip == flip
    assert checkpoint.weights.keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in checkpoint.weights.items())


def test_timms_moving_average(tmp_path):
    raw, average = small().state_dict(), small().state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "timm.pth")
    assert torch.equal(read_checkpoint(tmp_path / "timm.pth").weights["pos_embed"], raw["pos_embed"])
    assert torch.equal(read_checkpoint(tmp_path / "timm.pth", "ema").weights["pos_embed"], average["pos_embed"])


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_one_set_has_no_average(suffix, tmp_path):
    path = tmp_path / f"plain.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(small().state_dict(), path)
    with pytest.raises(UserError, match=r"average|'ema'"):
        read_checkpoint(path, "ema")
    with pytest.raises(UserError, match="'best'"):
        read_checkpoint(path, "best")


MKDIR = f"{os.mkdir.__module__}.mkdir"  # posix.mkdir, say: the name in a pickle


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_zip(content, path):
    torch.save(content, path)


def write_legacy(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(protocol):
    def write(content, path):
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return write


WRITERS = {"zip": write_zip, "legacy": write_legacy} | {f"pickle {p}": write_pickle(p) for p in range(6)}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", WRITERS)
def test_code_in_a_file_is_named_and_not_run(writer, tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "ran"
    WRITERS[writer]({"model": {"weight": torch.zeros(2)} if "pickle" not in writer else {}, "x": Payload(trace)}, path)
    with pytest.raises(UserError, match=rf"hostile.pth is refused.*{MKDIR}") as error:
        read_checkpoint(path)
    assert not trace.exists()
    assert "safetensors" in str(error.value)
    if "pickle" in writer:
        pickle.loads(path.read_bytes())
        assert trace.exists()  # it would have


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", WRITERS)
def test_the_global_named_is_the_one_refused(writer, tmp_path):
    path, trace = tmp_path / "hostile.pth", tmp_path / "ran"
    WRITERS[writer]({"first": collections.OrderedDict(a=1), "x": Payload(trace)}, path)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert not trace.exists()
    assert MKDIR in str(error.value)
    assert "OrderedDict" not in str(error.value)


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_every_type_beyond_plain_values_is_refused(writer, tmp_path):
    WRITERS[writer]({"model": small().state_dict(), "where": pathlib.PureWindowsPath("c:/")}, tmp_path / "file.pth")
    with pytest.raises(UserError, match="PureWindowsPath"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("kept", [0, 1, 2, 3, 4, 100, 0.25, 0.5, 0.9, -100, -22, -1])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind, kept, tmp_path):
    path = tmp_path / ("file.safetensors" if kind == "safetensors" else "file.pth")
    (save_file if kind == "safetensors" else WRITERS[kind])(small().state_dict(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match=rf"{path.name}.*copy or download it again"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
# torch's own complaints about a damaged pickle are of many types.
def test_damaged_files_are_refused_in_words(tmp_path):
    write_legacy({"weight": torch.zeros(3)}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        (tmp_path / "damaged.pth").write_bytes(damaged[: chance.choice([len(damaged), chance.randrange(len(damaged))])])
        try:
            read_checkpoint(tmp_path / "damaged.pth")
        except UserError as error:
            assert "damaged.pth" in str(error)  # noqa: PT017 (some damage goes unnoticed: it hit a number)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "a list"),
        (torch.zeros(3), "a Tensor"),
        ({"model": {"epoch": 3}}, "mapping of names to tensors"),
        ({"model": {}}, "mapping of names to tensors"),
        ({"model": [1]}, "mapping of names to tensors"),
        ({"lr": 0.1}, "mapping of names to tensors"),
        ({"model": None, "epoch": 1}, "it has none"),
    ],
)
def test_pickles_that_are_no_checkpoint(content, words, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=words):
        read_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"<html>404</html>", b"PK\x03\x04" + bytes(50)]
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_of_another_kind(suffix, data, tmp_path):
    path = tmp_path / f"file.{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match=path.name):
        read_checkpoint(path)


def test_a_folder_stands_for_its_weight_file(tmp_path):
    with pytest.raises(UserError, match="0 weight files"):
        read_checkpoint(tmp_path)
    torch.save(small().state_dict(), tmp_path / "last.pth")
    assert read_checkpoint(tmp_path).path == tmp_path / "last.pth"
    torch.save(small().state_dict(), tmp_path / "best.pth")
    with pytest.raises(UserError, match="2 weight files"):
        read_checkpoint(str(tmp_path))
    save_file(small().state_dict(), tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).path == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "name", ["missing.pth", "/no/such/folder/x.safetensors", "", "../up/there/x.pth", "a/b/c/d.pth"]
)
def test_a_path_that_does_not_exist_asks_no_one(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such weight file|0 weight files"):
        read_checkpoint(name)


@pytest.mark.parametrize(
    ("source", "repository", "filename"),
    [
        ("user/name", "user/name", "model.safetensors"),
        ("hf-hub:user/name", "user/name", "model.safetensors"),
        ("user/name/best.pth", "user/name", "best.pth"),
        ("Us-er/na.me_1/x.safetensors", "Us-er/na.me_1", "x.safetensors"),
    ],
)
def test_hub_names(source, repository, filename, tmp_path, monkeypatch):
    asked = []
    torch.save(small().state_dict(), tmp_path / "got.pth")

    def hub(*args, **kwargs):
        asked.append(args)
        return str(tmp_path / "got.pth")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    read_checkpoint(source)
    assert asked == [(repository, filename)]


def test_without_a_network_the_address_is_named(no_network):
    with pytest.raises(UserError, match=r"https://huggingface.co/user/name/resolve/main/model.safetensors"):
        read_checkpoint("user/name")


def test_a_file_that_the_hub_does_not_have(monkeypatch):
    def fail(*args, **kwargs):
        raise EntryNotFoundError("404: no such entry\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(UserError, match=r"name/resolve/main/x.pth: 404: no such entry$"):
        download("user/name", "x.pth")


def test_a_url_that_cannot_be_reached(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("patchscale.models.weight_files.download_cached_file", fail)
    with pytest.raises(UserError, match=r"cannot download https://example.org/x.pth.*no route to host"):
        read_checkpoint("https://example.org/x.pth")


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, and the address under which its files can be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_downloads_of_the_same_name_are_kept_apart(served):
    folder, address = served
    models = {name: small() for name in "ab"}
    for name, model in models.items():
        (folder / name).mkdir()
        save_file(model.state_dict(), folder / name / "model.safetensors")
    for _ in range(2):  # the second time from the cache
        for name, model in models.items():
            weights = read_checkpoint(f"{address}/{name}/model.safetensors").weights
            assert torch.equal(weights["pos_embed"], model.pos_embed)
        for file in folder.glob("*/*"):
            file.unlink()


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_damaged_download_can_be_deleted_by_its_message(name, served):
    folder, address = served
    (folder / name).write_bytes(b"<html>try again later</html>")
    with pytest.raises(UserError, match=rf"{address}/{name}: delete it") as error:
        read_checkpoint(f"{address}/{name}")
    pathlib.Path(str(error.value).split(" is not a ")[0]).unlink()
    (save_file if name.endswith("safetensors") else torch.save)(small().state_dict(), folder / name)
    assert "pos_embed" in read_checkpoint(f"{address}/{name}").weights


@pytest.mark.parametrize("url", ["http://[::1/x.pth", "http://127.0.0.1:port/x.pth", "http://127.0.0.1:1/x.pth"])
def test_a_url_that_is_none(url, served):
    with pytest.raises(UserError) as error:
        read_checkpoint(url)
    assert f"cannot download {url} (" in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "tensor", "shapes"),
    [
        ({"embed_dim": 64}, "cls_token", ["(1, 1, 32)", "(1, 1, 64)"]),
        ({"d_state": 16}, "layers.0.mixer.in_proj.weight", ["(257, 32)", "(161, 32)"]),
        ({"headdim": 32}, "layers.0.mixer.dt_bias", ["(1,)", "(2,)"]),
        ({"num_classes": 7}, "head.weight", ["(5, 32)", "(7, 32)"]),
        ({"depth": 3}, "layers.2.", ["missing"]),
        ({"depth": 1}, "layers.1.", ["not in the model"]),
    ],
)
def test_weights_of_other_sizes_are_refused_by_name_and_shapes(arguments, tensor, shapes, parity):
    model = small(**arguments)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(model, parity("checkpoint_official.pth"))
    assert all(word in str(error.value) for word in ("checkpoint_official.pth", tensor, *shapes))
    # Nothing is half-loaded.
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_head_of_other_classes_may_keep_its_own(parity):
    model = small(num_classes=7)
    head = {k: v.clone() for k, v in model.head.state_dict().items()}
    load_weights(model, parity("checkpoint_official.pth"), strict=False)
    weights = read_checkpoint(parity("checkpoint_official.pth")).weights
    for name, value in model.state_dict().items():
        assert torch.equal(value, head[name.removeprefix("head.")] if name.startswith("head.") else weights[name]), name


@pytest.mark.parametrize(
    ("name", "sizes", "heads"),
    [
        ("test_convnext", {}, ("head.fc.",)),  # whose head has a norm too
        ("resnet10t", {}, ("fc.",)),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 1}, ("head.", "head_dist.")),
    ],
)
def test_heads_are_where_timm_says_they_are(name, sizes, heads, tmp_path):
    trained = timm.create_model(name, num_classes=5, **sizes).state_dict()
    source = {k: torch.rand_like(v.float()) for k, v in trained.items()}
    save_file(source, tmp_path / "weights.safetensors")
    model = timm.create_model(name, num_classes=7, **sizes)
    own = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=r"same num_classes, or pass strict=False"):
        load_weights(model, tmp_path / "weights.safetensors")
    load_weights(model, tmp_path / "weights.safetensors", strict=False)
    for k, value in model.state_dict().items():
        assert torch.equal(value, own[k] if k.startswith(heads) else source[k].to(value.dtype)), k


def test_an_unknown_way_to_resize_is_refused(parity):
    with pytest.raises(UserError, match="resize is 'x', expected one of 'correct', 'published'"):
        load_weights(small(), parity("checkpoint_official.pth"), resize="x")


SHAPES = [(), (0,), (1,), (5, 5), (0, 0, 0, 0)]


@pytest.mark.parametrize(
    ("key", "shapes"),
    [
        ("pos_embed", [*SHAPES, (1, 0, 32), (1, 1, 32), (1, 17, 0), (2, 17, 32)]),
        ("patch_embed.proj.weight", [*SHAPES, (32, 3, 0, 0), (32, 0, 4, 4)]),
        ("cls_token", SHAPES),
        ("head.weight", SHAPES),
        ("layers.0.mixer.A_log", [*SHAPES[:2], (200,), *SHAPES[3:]]),
        ("layers.0.mixer.norm.weight", SHAPES),
        ("layers.0.mixer.conv1d.weight", [*SHAPES, (3, 1, 4)]),
    ],
)
@pytest.mark.parametrize("record", [{}, {"args": argparse.Namespace()}, {"model_args": {"img_size": 16}}])
@pytest.mark.parametrize("patch_size", [4, 2])
def test_tensors_of_any_shape_are_refused_in_words(key, shapes, record, patch_size, tmp_path):
    state = small().state_dict()
    for shape in shapes:
        torch.save({"model": state | {key: torch.zeros(shape)}, **record}, tmp_path / "hostile.pth")
        checkpoint = read_checkpoint(tmp_path / "hostile.pth")
        with pytest.raises(UserError):
            fill(small(patch_size=patch_size), checkpoint)
        with pytest.raises(UserError):
            create_from_checkpoint(checkpoint)


@pytest.mark.parametrize("arguments", [{"pos_grid": -4}, {"pos_grid": (0, 5)}, {"extend": -1}])
def test_a_recorded_grid_without_places_is_refused(arguments, tmp_path):
    model = small()
    torch.save({"model": model.state_dict(), "model_args": {"img_size": 16} | arguments}, tmp_path / "hostile.pth")
    with pytest.raises(UserError, match="records sizes that make no grid"):
        load_weights(model, tmp_path / "hostile.pth")


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_without_a_head_takes_the_rest(strict, parity):
    model = load_weights(small(num_classes=0), parity("checkpoint_official.pth"), strict=strict)
    weights = read_checkpoint(parity("checkpoint_official.pth")).weights
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_file_without_a_head_leaves_the_models_own(tmp_path):
    source = small(num_classes=0)
    save_file(source.state_dict(), tmp_path / "backbone.safetensors")
    model = small()
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "backbone.safetensors", strict=False)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_strict_false_forgives_the_head_alone(parity):
    with pytest.raises(UserError, match="cls_token"):
        load_weights(small(embed_dim=64), parity("checkpoint_official.pth"), strict=False)


def test_written_whole_then_renamed(tmp_path):
    path = tmp_path / "file.bin"
    path.write_text("old")
    seen = []

    def write(temporary: pathlib.Path) -> None:
        temporary.write_text("new")
        seen.append((temporary, path.read_text()))

    write_atomically(path, write)
    ((temporary, before),) = seen
    assert before == "old"
    assert temporary.parent == tmp_path  # on the same file system, or renaming would copy
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("unexpected pos 64 vs 0"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (TypeError("a bug"), TypeError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), UserError),
        (RuntimeError(), UserError),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error, raised, tmp_path):
    path = tmp_path / "file.bin"
    path.write_text("old")

    def write(temporary: pathlib.Path) -> None:
        temporary.write_text("ha")
        raise error

    with pytest.raises(raised, match=r"file.bin" if raised is UserError else None):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]


@contextlib.contextmanager
def no_file_over(size: int):
    """The system refuses to write more, as a full disk would; briefly, for the tests' log may be a file too."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_full_disk_is_one_clear_error(save, tmp_path):
    with no_file_over(20_000), pytest.raises(UserError, match=r"cannot write .*file.bin"):
        write_atomically(tmp_path / "file.bin", lambda path: save({"weight": torch.zeros(100_000)}, path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*file/below"):
        make_folder(tmp_path / "file" / "below")
    with pytest.raises(UserError, match="cannot write"):
        write_atomically(tmp_path / "missing" / "x.bin", lambda path: path.write_text("x"))
    make_folder(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())


def test_a_head_that_fits_is_loaded_whatever_order_the_file_has(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "sorted.safetensors")
    twin = load_weights(small(), tmp_path / "sorted.safetensors", strict=False)
    assert torch.equal(twin.head.weight, model.head.weight)
