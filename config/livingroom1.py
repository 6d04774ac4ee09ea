"""A real recording, stage 1 (commands: docs/evaluation.md): the miniature's geometry goes on.

ICL-NUIM living room: windows of an 81-frame clip to train on, of a 21-frame clip to validate."""

preset = "tiny"
stage = 1
data_dir = "data/livingroom"
out_dir = "outputs/livingroom/stage1"
wan_dir = "tiny/wan"
init_from = "tiny/fantasyworld.safetensors"

height, width, num_frames = 96, 128, 9
batch_size, num_workers = 4, 0
max_steps, save_every, log_every, eval_every = 200, 100, 20, 100

optimizer, learning_rate, min_lr, lr_schedule, warmup_steps = "muon", 5e-4, 1e-5, "linear", 20
