#!/usr/bin/env bash
# How tiny/ is made: hours of two cores; started again, it goes on.  WORK holds rooms and runs.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-data/tiny}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4000000000  # fewer page faults
P=--precision=${PRECISION:-bf16}  # fp32 on a CPU without AVX-512: bf16 takes it many times as long
ROOMS="--num_frames 9 --variety simple --cache_only True --wan_dir $WORK/wan"

# ---- encoders
python tiny/train_vae.py --work "$WORK/vae" --steps 4800
python tiny/train_vae.py --work "$WORK/vae2" --steps 1500 --lr 1e-2       # from the file that the first has written
[ -f "$WORK/wan/diffusion_pytorch_model.safetensors" ] || python tiny/make_text.py "$WORK/wan"
cp tiny/wan/Wan2.1_VAE.safetensors "$WORK/wan/"
cp -r "$WORK/wan/google" "$WORK/wan/models_t5_umt5-xxl-enc-bf16.safetensors" tiny/wan/

# ---- stage 0: the video branch, on small rooms, then on larger ones
python data.py synth "$WORK/small" --num 5000 --val 24 --height 64 --width 96 --seed 50000000 $ROOMS
python data.py synth "$WORK/rooms" --num 4000 --val 64 --height 96 --width 160 --seed 80000000 $ROOMS
python train.py config/tiny0.py --data_dir="$WORK/small" --wan_dir="$WORK/wan" $P
python tiny/export.py outputs/tiny/stage0/latest.safetensors tiny/wan
python train.py config/tiny0.py --data_dir="$WORK/rooms" --wan_dir=tiny/wan $P --out_dir=outputs/tiny/stage0_large \
    --height=96 --width=160 --batch_size=8 --learning_rate=2e-3 --max_steps=3500
python tiny/export.py outputs/tiny/stage0_large/latest.safetensors tiny/wan

# ---- stages 1 and 2: the geometry branch and the exchange
python train.py config/tiny1.py --data_dir="$WORK/rooms" $P
python train.py config/tiny2.py --data_dir="$WORK/rooms" $P
python tiny/export.py outputs/tiny/stage2/latest.safetensors tiny/fantasyworld.safetensors

# ---- both again, on other rooms: a camera that is seldom given must be read off the video
MORE="--seed=1 --camera_delta=0.02 --camera_weight=5"
python data.py synth "$WORK/more" --num 4000 --val 64 --height 96 --width 160 --seed 82000000 $ROOMS
python train.py config/tiny1.py --data_dir="$WORK/more" $P $MORE --pose_dropout=0.5 --max_steps=2600 \
    --out_dir=outputs/tiny/stage1_more --init_from=tiny/fantasyworld.safetensors
python train.py config/tiny2.py --data_dir="$WORK/more" $P $MORE --pose_dropout=0.3 --max_steps=600 \
    --out_dir=outputs/tiny/stage2_more --init_from=outputs/tiny/stage1_more/latest.safetensors
python tiny/export.py outputs/tiny/stage2_more/latest.safetensors tiny/fantasyworld.safetensors
python tiny/score.py --ckpt tiny/fantasyworld.safetensors
