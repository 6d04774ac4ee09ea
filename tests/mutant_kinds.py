"""The files that tests/mutants.py changes, how it changes them, and the tool that reads each."""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bad_data  # noqa: E402
import damage  # noqa: E402
import test_rasters  # noqa: E402
import test_strangers  # noqa: E402
import test_vggt  # noqa: E402
from released_keys import TINY as RELEASED  # noqa: E402
from released_keys import release_tensors  # noqa: E402
from small import TINY, tiny_model  # noqa: E402
from wan_folder import write_wan_folder  # noqa: E402

from encoders import MINIATURE  # noqa: E402
from lib import pictures, rooms, weights  # noqa: E402
from lib.tensors import write_tensors  # noqa: E402

HOSTILE = [
    None, True, False, 0, -1, 1e9, 10**30, 0.5, 1e308, "", "x", "../../etc/passwd", "\x1b[2J\n",
    [], {}, [1], {"a": 1}, [[]], "9" * 400, "nan", [1e9] * 5,
]  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A file and the tool that reads it."""

    path: Path  # of the file that is changed
    arguments: list  # of the tool, script first; OUT stands for a fresh folder
    change: object  # (bytes, rng) -> bytes
    names: tuple = ()  # besides the path's own: what a refusal may name
    sure: bool = False  # a checksum covers all of it


# -------------------------------------------------------------------------------------- the changes
def any_bytes(content, rng):
    """A change that knows nothing of the format; several at times."""
    for _ in range(rng.choice((1, 1, 3))):
        content = test_strangers.mutant(content or b"\0", rng)
    return content


def json_values(content, rng):
    """JSON with one to three values replaced, deleted or doubled."""
    try:
        whole = json.loads(content)
    except ValueError:
        return any_bytes(content, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = whole, None
        while isinstance(holder, (dict, list)) and holder:
            key = (
                rng.choice(sorted(holder))
                if isinstance(holder, dict)
                else rng.randrange(len(holder))
            )
            if not isinstance(holder[key], (dict, list)) or rng.random() < 0.3:
                break
            holder = holder[key]
        if not isinstance(holder, (dict, list)) or not holder:
            continue
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(HOSTILE)
    return json.dumps(whole).encode()


def mixed(content, rng):
    return (json_values if rng.random() < 0.6 else any_bytes)(content, rng)


def json_lines(content, rng):
    """The same for a file of one JSON object a line."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mixed(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def header(content, rng):
    """A safetensors file whose header says something else."""
    if rng.random() < 0.4:
        return any_bytes(content, rng)
    size = int.from_bytes(content[:8], "little")
    head = mixed(content[8 : 8 + size], rng)
    length = len(head) if rng.random() < 0.9 else rng.choice((0, 2**40, 2**63, size))
    return length.to_bytes(8, "little") + head + content[8 + size :]


def signed(content, rng):
    """A checkpoint that a stranger made: other metadata or tensors, and a right digest."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        Path(file.name).write_bytes(content)
        tensors, meta = weights.read_tensors(file.name)
        tensors = {k: v.clone() for k, v in tensors.items()}
        meta = {k: v for k, v in meta.items() if k not in ("sha256", "format")}
        if rng.random() < 0.75:
            key = rng.choice([*meta, "model_config", "model_config", "train_config"])
            if key in ("model_config", "train_config") and rng.random() < 0.9:
                meta[key] = json_values(meta[key].encode(), rng).decode()
            else:
                meta[key] = rng.choice(("", "x", "-1", "9" * 30, "null", "[]", "{}", '"a"'))
        else:
            name = rng.choice(sorted(tensors))
            changes = ("drop", "grow", "flat", "int", "nan", "name", "index")
            change_tensor(tensors, name, rng.choice(changes))
        meta["digest"] = "2"
        meta["sha256"] = weights.digest(tensors, meta)
        write_tensors(tensors, meta, Path(file.name))
        return Path(file.name).read_bytes()


def change_tensor(tensors, name, how):
    value = tensors.pop(name)
    changed = dict(
        grow=lambda: torch.cat([value.reshape(-1), value.reshape(-1)]),
        flat=lambda: value.reshape(-1),
        int=lambda: value.long(),
        nan=lambda: torch.full_like(value, float("nan")),
        name=lambda: value,
        index=lambda: value,
    )
    if how != "drop":
        other = dict(name=name + "x", index="dit.blocks.99999999." + name)
        tensors[other.get(how, name)] = changed[how]()


def pickled(content, rng):
    """A .pth file with other tensors, or with other bytes."""
    if rng.random() < 0.5:
        return any_bytes(content, rng)
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        Path(file.name).write_bytes(content)
        tensors = torch.load(file.name, weights_only=True)
        for _ in range(rng.choice((1, 2))):
            name = rng.choice(sorted(tensors))
            change_tensor(tensors, name, rng.choice(("drop", "grow", "flat", "int", "name")))
        if rng.random() < 0.3:
            name = rng.choice(sorted(tensors))
            tensors[name] = rng.choice((3, "words", None, [1], torch.zeros(()), torch.zeros(0)))
        if rng.random() < 0.2:
            index = rng.choice(("IRGBlock.99999999.x", "aggregator.frame_blocks.99999999.x"))
            tensors[index] = torch.zeros(1)
        torch.save(tensors, file.name)
        return Path(file.name).read_bytes()


# ---------------------------------------------------------------------------------------- the files
def write_checkpoint(root):
    """A stage 2 checkpoint of an untrained model on a stage 0 run, with its digest."""
    model = tiny_model(2, awake=True, has_control=True)
    (root / "s0").mkdir()
    meta = dict(model_config=json.dumps(vars(model.cfg)), step="3", digest="2")
    trained = dict(num_frames=5, height=32, width=48, wan_dir=str(root / "s0"))
    dit = {f"dit.{k}": v.contiguous() for k, v in model.dit.state_dict().items()}
    began = dict(meta, stage="0", train_config=json.dumps(dict(wan_dir=MINIATURE)))
    save_file(dit, root / "s0" / "latest.safetensors", began)
    own = {k: v.contiguous() for k, v in model.trainable_state_dict().items()}
    meta.update(stage="2", train_config=json.dumps(trained))
    meta["sha256"] = weights.digest(own, meta)
    write_tensors(own, meta, root / "two.safetensors")
    return root / "two.safetensors"


def sampling(root, ckpt, *more):
    quick = "--steps=1 --guidance=1 --export=npz --device=cpu --frames=5 --height=32 --width=48"
    return ["sample.py", f"--ckpt={ckpt}", *quick.split(), "--out=OUT", *map(str, more)]


def model_files(root):
    """Checkpoints, releases, VGGT, the parts of a Wan folder, tokenizer."""
    ckpt = write_checkpoint(root)
    yield "checkpoint", Kind(ckpt, sampling(root, ckpt), header, sure=True)
    yield "checkpoint, signed", Kind(ckpt, sampling(root, ckpt), signed, sure=False)
    yield "checkpoint, --check", Kind(ckpt, ["train.py", "--check", ckpt], signed)
    wan = root / "wan"
    shutil.copytree(MINIATURE, wan)
    shutil.copy(ROOT / "tiny" / "fantasyworld.safetensors", root / "world.safetensors")
    made = sampling(root, root / "world.safetensors", f"--wan_dir={wan}", "--other_wan=True")
    names = dict(tokenizer=("google/umt5-xxl/tokenizer.json", mixed))
    names["Wan DiT"] = ("diffusion_pytorch_model.safetensors", header)
    names["Wan VAE"] = ("Wan2.1_VAE.safetensors", header)
    names["umT5"] = ("models_t5_umt5-xxl-enc-bf16.safetensors", header)
    for name, (file, change) in names.items():
        yield name, Kind(wan / file, made, change, (str(wan),))
    write_wan_folder(root / "I2V", "i2v", in_dim=36, camera=False)
    torch.save(release_tensors(RELEASED, video=False), root / "model.pth")
    release = sampling(root, root / "model.pth", f"--wan_dir={root / 'I2V'}")
    yield "release", Kind(root / "model.pth", release, pickled)
    torch.save(test_vggt.vggt(), root / "vggt.pt")
    sizes = dict(vars(TINY), camera_dim=64, camera_layers=2)
    rooms.synth(root / "clips", rooms.Recipe(2, 5, 32, 48, 0, "simple", cache_only=True, val=0))
    how = f"--data_dir={root}/clips --wan_dir= --random_wan=True --height=32 --width=48 "
    how += "--num_frames=5 --num_workers=0 --batch_size=2 --eval_every=0 --max_steps=1 --device=cpu"
    line = ["train.py", "config/tiny1.py", *how.split(), f"--model_overrides={sizes}"]
    yield (
        "VGGT",
        Kind(root / "vggt.pt", [*line, f"--init_from={root}/vggt.pt", "--out_dir=OUT"], pickled),
    )


def text_files(root):
    """Prompts, lists of jobs, configs, start images."""
    ckpt = write_checkpoint(root)
    (root / "prompts.txt").write_text("a red room\n# aside\na blue room\n")
    yield (
        "prompts",
        Kind(root / "prompts.txt", sampling(root, ckpt, f"--prompt={root}/prompts.txt"), any_bytes),
    )
    job = dict(id="a", prompt="a room", camera="orbit", seed=1, guidance=1.0, amount=0.5, steps=1)
    (root / "list.jsonl").write_text(json.dumps(job) + "\n" + json.dumps(dict(job, id="b")) + "\n")
    yield (
        "jobs",
        Kind(root / "list.jsonl", sampling(root, ckpt, f"--jobs={root}/list.jsonl"), json_lines),
    )
    (root / "stage.py").write_text((ROOT / "config" / "tiny2.py").read_text())
    yield "config", Kind(root / "stage.py", ["config", root / "stage.py"], any_bytes)
    picture = np.arange(48 * 64 * 3, dtype="u1").reshape(48, 64, 3)
    pictures.write_png(root / "start.png", picture)
    pictures.write_video(root / "start.mp4", np.stack([picture] * 5), 8)
    shutil.copy(ROOT / "examples" / "room.jpg", root / "start.jpg")
    for end in ("png", "jpg", "mp4"):
        path = root / f"start.{end}"
        yield f"image {end}", Kind(path, sampling(root, ckpt, f"--image={path}"), any_bytes)


def camera_kinds(root):
    """Every camera format, through `data.py cameras`."""
    found = test_strangers.write_all(root)
    del found["vipe"]  # its clip has a frame without a pose, which is refused whole
    for name, (path, options) in found.items():
        folder = path.parent.name in ("a.colmap", "b.colmap", "seq-01")
        source = path.parent if folder else path
        line = ["data.py", "cameras", source, "OUT/cameras.npz", "--size", "48x64", "--to", "npz"]
        line += ["--from", test_strangers.FORMS.get(name, name)]
        line += [f"--{k}={v}" for k, v in options.items()]
        change = mixed if name in ("fantasyworld", "nerfstudio") else any_bytes
        yield f"cameras {name}", Kind(path, line, change, (str(source),))


def dataset_kinds(root):
    """Every container of a dataset, through `data.py verify` and `data.py encode`."""
    finders = {k: v for k, v in damage.PARTS.items() if k not in ("scan", "avi")}
    for name, (form, find) in [
        *finders.items(),
        ("metadata", ("npy", None)),
        ("exr", ("exr", None)),
    ]:
        place = dataset(root, form)
        rng = np.random.default_rng(0)
        path = place.root / "metadata.json" if name == "metadata" else find and find(place, rng)
        path = path or sorted(place.depth.glob("*"))[0]
        change = mixed if name == "metadata" else any_bytes
        size = "--height=32 --width=48 --num_frames=5".split()
        encode = ["data.py", "encode", place.root, f"--wan_dir={MINIATURE}", *size]
        also = (damage.VICTIM, str(place.root), "metadata.json")
        for tool, line in (("verify", ["data.py", "verify", place.root]), ("encode", encode)):
            yield f"{name}, {tool}", Kind(path, line, change, also)


def dataset(root, form):
    """bad_data's dataset of a form without its cache; also with EXR and PGM depth."""
    own = form in ("exr", "pgm")
    built = bad_data.build(root, "npy" if own else form)
    target = root / f"raw-{form}"
    if not target.exists():
        shutil.copytree(built, target, ignore=shutil.ignore_patterns("cache"))
        place = bad_data.at(target)
        for path in sorted(place.depth.glob("*.npy")) if own else ():
            array = np.load(path).astype("f4")
            path.with_suffix(".exr").write_bytes(exr_bytes(array))
            path.unlink()
    return bad_data.at(target)


def exr_bytes(depth):
    """A float32 EXR of one channel, without compression."""
    return test_rasters.exr(depth, "Z", "<f4", 3, 16, test_rasters.deflated)


GROUPS = (model_files, text_files, camera_kinds, dataset_kinds)
