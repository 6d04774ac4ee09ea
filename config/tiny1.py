"""The miniature in tiny/, stage 1: the geometry branch on its frozen video branch."""

preset = "tiny"
stage = 1
data_dir = "data/tiny/rooms"
out_dir = "outputs/tiny/stage1"
wan_dir = "tiny/wan"

height, width, num_frames = 96, 160, 9
batch_size, num_workers = 8, 0
max_steps, save_every, log_every, eval_every = 2000, 250, 50, 0

optimizer, learning_rate, min_lr, lr_schedule = "muon", 2e-3, 2e-5, "linear"
warmup_steps, beta2 = 50, 0.95
sampling = {"steps": 8, "guidance": 1.0, "shift": 3.0}
