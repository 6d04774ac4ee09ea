#!/usr/bin/env bash
# The whole method at toy size on a laptop: render rooms, train stages 0, 1 and 2, evaluate on unseen rooms, sample.
# A demonstration: the frozen video branch is a tiny DiT trained here for minutes, not Wan2.1; codec and text encoder
# are fixed transforms.  Same code and commands as the real runs.
set -euo pipefail
cd "$(dirname "$0")"
started=$SECONDS
say() { printf '\n== %s  (%d min %02d s so far)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
PYTHON=${PYTHON:-python}

say "1/6 render training rooms and 64 rooms of other seeds that no training sees"
$PYTHON data.py synth data/demo --num 4000 --val 64 --num_frames 9 --height 64 --width 96 --seed 0 --variety simple --cache_only True
say "2/6 stage 0: a tiny video DiT from scratch, in place of the Wan2.1 weights"
$PYTHON train.py config/demo0.py
say "3/6 stage 1: the geometry branch on the frozen video branch"
$PYTHON train.py config/demo1.py
say "4/6 stage 2: camera adapters and video <-> geometry exchange"
$PYTHON train.py config/demo2.py
say "5/6 evaluate on the unseen rooms"
$PYTHON train.py config/demo2.py --eval_only=True --eval_clips=64 --eval_more_sigmas="()" --out_dir=outputs/demo \
    --init_from=outputs/demo/stage1/latest.safetensors,outputs/demo/stage2/latest.safetensors
say "6/6 sample a world from a start image, a prompt and a camera path"
$PYTHON data.py synth data/demo_start --num 1 --num_frames 9 --height 64 --width 96 --seed 20000037 --variety simple --workers 0
$PYTHON sample.py --ckpt outputs/demo/stage2/latest.safetensors --image data/demo_start/train_000000/video.mp4 \
    --prompt "a room with a teal box, the camera moves forward" --camera forward --steps 4 --guidance 1 --out outputs/demo/sample
say "done: open outputs/demo/sample/scene.html in a browser, look at sheet.png beside it; table in outputs/demo/eval.json"
