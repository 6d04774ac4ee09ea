#!/usr/bin/env bash
# A world from the miniature that is shipped in tiny/, in the first minute; then the whole method anew on a laptop: render
# and encode rooms, train stages 1 and 2 on the miniature's video branch, evaluate on unseen rooms, sample.
# The same code and commands as the real runs; only --wan_dir and the sizes differ.
set -euo pipefail
cd "$(dirname "$0")"
started=$SECONDS
say() { printf '\n== %s  (%d min %02d s so far)\n' "$1" $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)); }
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$($PYTHON tiny/threads.py)}  # on shared cores one is many times faster than two
SIZE="--num_frames 9 --height 96 --width 160"
RUN="--data_dir=data/demo --batch_size=4"

say "1/6 a world from the shipped miniature (threads: $OMP_NUM_THREADS): open outputs/demo/world/scene.html while the rest trains"
$PYTHON sample.py --ckpt tiny/fantasyworld.safetensors --image examples/room.jpg \
    --prompt "a room with two boxes and an orange sphere, the camera moves right" --camera right --out outputs/demo/world
say "2/6 render rooms, and 32 of other seeds that no training sees; encode them with the encoders in tiny/wan"
$PYTHON data.py synth data/demo --num 900 --val 32 $SIZE --seed 0 --variety simple --cache_only True
say "3/6 stage 1: the geometry branch on the frozen video branch"
$PYTHON train.py config/tiny1.py $RUN --out_dir=outputs/demo/stage1 --max_steps=350
say "4/6 stage 2: camera adapters and video <-> geometry exchange"
$PYTHON train.py config/tiny2.py $RUN --out_dir=outputs/demo/stage2 --max_steps=120 \
    --init_from=outputs/demo/stage1/latest.safetensors
say "5/6 evaluate on the unseen rooms, beside the shipped miniature, which has trained for hours"
$PYTHON train.py config/tiny2.py $RUN --eval_only=True --eval_clips=32 --eval_more_sigmas="()" --out_dir=outputs/demo \
    --init_from=outputs/demo/stage1/latest.safetensors,outputs/demo/stage2/latest.safetensors,tiny/fantasyworld.safetensors
say "6/6 sample a world from what was just trained"
$PYTHON sample.py --ckpt outputs/demo/stage2/latest.safetensors --image examples/room2.jpg \
    --prompt "a room with a green box, the camera moves forward" --camera forward --out outputs/demo/sample
say "done: open outputs/demo/world/scene.html and outputs/demo/sample/scene.html; the table is in outputs/demo/eval.json"
