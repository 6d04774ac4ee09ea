#!/usr/bin/env bash
# How tiny/wan is made: hours of two cores; started again, it goes on.  WORK holds rooms and runs.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-data/tiny}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000  # fewer page faults

python tiny/train_vae.py --work "$WORK/vae" --steps 4800
python tiny/train_vae.py --work "$WORK/vae2" --steps 1500 --lr 1e-2       # from the file that the first has written
[ -f "$WORK/wan/diffusion_pytorch_model.safetensors" ] || python tiny/make_text.py "$WORK/wan"
cp tiny/wan/Wan2.1_VAE.safetensors "$WORK/wan/"
python data.py synth "$WORK/rooms" --num 5000 --val 24 --num_frames 9 --height 64 --width 96 --seed 50000000 \
    --variety simple --cache_only True --wan_dir "$WORK/wan"
python train.py config/tiny0.py --data_dir="$WORK/rooms" --wan_dir="$WORK/wan" --precision=bf16
cp -r "$WORK/wan/google" "$WORK/wan/models_t5_umt5-xxl-enc-bf16.safetensors" tiny/wan/
python tiny/export.py outputs/tiny/stage0/latest.safetensors tiny/wan
