"""Demo, stage 2: camera adapters and the exchange join, from the demo's stage 1 (see demo.sh)."""

preset = "demo"
stage = 2
data_dir = "data/demo"
out_dir = "outputs/demo/stage2"
wan_dir = "outputs/demo/stage0"
init_from = "outputs/demo/stage1/latest.safetensors"

height, width, num_frames = 64, 96, 9
batch_size, num_workers = 4, 0
max_steps, save_every, log_every, eval_every = 200, 200, 50, 0

learning_rate, min_lr, lr_schedule, warmup_steps = 5e-4, 5e-5, "cosine", 50
