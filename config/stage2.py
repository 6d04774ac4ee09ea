"""Stage 2, unified co-optimization: camera adapters and the exchange join; Wan stays frozen.

    torchrun --nproc_per_node=8 train.py config/stage2.py

global batch 112 = 8 GPUs x batch_size 1 x grad_accum 14: the guide's 8 x 14, one clip at a time,
because 81 frames are 16,317 video tokens
4 GPUs: --grad_accum=28     2 GPUs: --grad_accum=56     1 GPU: --grad_accum=112
"""

preset = "1.3b"
stage = 2
data_dir = "data/train"
out_dir = "outputs/stage2"
wan_dir = "weights/Wan2.1-Fun-V1.1-1.3B-Control-Camera"
init_from = "outputs/stage1/latest.safetensors"

height, width, num_frames = 592, 336, 81
batch_size, grad_accum = 1, 14
max_steps, save_every, keep_last = 10000, 500, 3

learning_rate = 1e-5
warmup_steps = 100
grad_clip = 1.0
checkpoint_activations = "selective"
