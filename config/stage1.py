"""Stage 1, latent bridging: the geometry branch learns to read the frozen video branch.

    torchrun --nproc_per_node=8 train.py config/stage1.py

global batch 64 = 8 GPUs x batch_size 8 x grad_accum 1
4 GPUs: --grad_accum=2     2 GPUs: --grad_accum=4     1 GPU: --grad_accum=8
Less memory: halve batch_size and double grad_accum, or --checkpoint_activations=full.
--plan --plan_gpus=4 --plan_gb=48 says which settings fit 4 GPUs of 48 GB.
"""

preset = "1.3b"
stage = 1
data_dir = "data/train"
out_dir = "outputs/stage1"
wan_dir = "weights/Wan2.1-Fun-V1.1-1.3B-Control-Camera"

height, width, num_frames = 336, 592, 21
batch_size, grad_accum = 8, 1
max_steps, save_every, keep_last = 20000, 1000, 3

learning_rate = 1e-5  # 5e-6 when the loss rises
warmup_steps = 100
grad_clip = 1.0
checkpoint_activations = "selective"
