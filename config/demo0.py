"""Demo, stage 0: a tiny video DiT from scratch on rendered rooms, in place of Wan (see demo.sh)."""

preset = "demo"
stage = 0
data_dir = "data/demo"
out_dir = "outputs/demo/stage0"

height, width, num_frames = 64, 96, 9
batch_size, num_workers = 8, 0
max_steps, save_every, log_every, eval_every = 700, 350, 50, 0

learning_rate, min_lr, lr_schedule, warmup_steps, beta2 = 3e-3, 1e-4, "cosine", 50, 0.95
