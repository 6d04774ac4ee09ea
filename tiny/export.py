"""A stage 0 checkpoint as the DiT of a Wan folder, in half precision:
`python tiny/export.py CHECKPOINT FOLDER`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.files import write_aside  # noqa: E402
from lib.tensors import write_tensors  # noqa: E402
from lib.weights import read_checked  # noqa: E402


def main(checkpoint, folder):
    tensors, meta = read_checked(checkpoint)
    half = {name.removeprefix("dit."): value.half() for name, value in tensors.items()}
    facts = {key: meta[key] for key in ("command", "git", "step", "versions")}
    target = Path(folder) / "diffusion_pytorch_model.safetensors"
    write_aside(target, lambda path: write_tensors(half, facts, path))
    print(f"{target}: {len(half)} tensors, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
