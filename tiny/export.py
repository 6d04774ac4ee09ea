"""A checkpoint in half precision, as the miniature is shipped:

python tiny/export.py STAGE_0_CHECKPOINT tiny/wan              the DiT of a Wan folder
python tiny/export.py STAGE_2_CHECKPOINT tiny/NAME.safetensors a checkpoint for sample.py"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lib.files import write_aside  # noqa: E402
from lib.guards import run_command  # noqa: E402
from lib.tensors import write_tensors  # noqa: E402
from lib.weights import digest, read_checked  # noqa: E402


def main(checkpoint, target):
    tensors, meta = read_checked(checkpoint)
    half = {name.removeprefix("dit."): value.half() for name, value in tensors.items()}
    target = Path(target)
    if meta["stage"] == "0":
        facts = {key: meta[key] for key in ("command", "git", "step", "versions")}
        target = target / "diffusion_pytorch_model.safetensors"
    else:
        facts = {key: value for key, value in meta.items() if key != "sha256"}
        facts["sha256"] = digest(half, facts)
    write_aside(target, lambda path: write_tensors(half, facts, path))
    print(f"{target}: {len(half)} tensors, {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    run_command("tiny/export.py", partial(main, *sys.argv[1:]))
