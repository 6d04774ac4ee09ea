"""The miniature in tiny/, stage 2: camera adapters and the exchange join (see tiny/make.sh)."""

preset = "tiny"
stage = 2
data_dir = "data/tiny/rooms"
out_dir = "outputs/tiny/stage2"
wan_dir = "tiny/wan"
init_from = "outputs/tiny/stage1/latest.safetensors"

height, width, num_frames = 96, 160, 9
batch_size, num_workers = 8, 0
max_steps, save_every, log_every, eval_every = 700, 100, 50, 0

optimizer, learning_rate, min_lr, lr_schedule = "muon", 1e-3, 1e-5, "linear"
warmup_steps, beta2 = 50, 0.95
sampling = {"steps": 8, "guidance": 1.0, "shift": 3.0}
