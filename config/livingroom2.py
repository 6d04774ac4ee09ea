"""A real recording, stage 2 (commands: docs/evaluation.md): camera adapters and the exchange.

ICL-NUIM living room: windows of an 81-frame clip to train on, of a 21-frame clip to validate."""

preset = "tiny"
stage = 2
data_dir = "data/livingroom"
out_dir = "outputs/livingroom/stage2"
wan_dir = "tiny/wan"
init_from = "outputs/livingroom/stage1/latest.safetensors"

height, width, num_frames = 96, 128, 9
batch_size, num_workers = 4, 0
max_steps, save_every, log_every, eval_every = 100, 50, 20, 100

optimizer, learning_rate, min_lr, lr_schedule, warmup_steps = "muon", 3e-4, 1e-5, "linear", 20
sampling = {"steps": 8, "guidance": 1.0, "shift": 3.0}
