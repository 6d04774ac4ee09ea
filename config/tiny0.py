"""The miniature in tiny/, stage 0: a small Wan DiT on rendered rooms (see tiny/make.sh)."""

preset = "tiny"
stage = 0
data_dir = "data/tiny/small"
out_dir = "outputs/tiny/stage0"

height, width, num_frames = 64, 96, 9
batch_size, num_workers = 16, 0
max_steps, save_every, log_every, eval_every = 3000, 250, 50, 0

optimizer, learning_rate, min_lr, lr_schedule = "muon", 3e-3, 3e-5, "linear"
warmup_steps, beta2, shift = 50, 0.95, 3.0
