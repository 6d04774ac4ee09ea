"""A real recording, stage 2: camera adapters and the exchange.

ICL-NUIM living room: an 81-frame clip to train on, a 21-frame clip to validate.  The commands are
in docs/evaluation.md; no Wan weights are needed, since stage 0 trains on the clip itself.
"""

preset = "demo"
stage = 2
data_dir = "data/livingroom"
out_dir = "outputs/livingroom/stage2"
wan_dir = "outputs/livingroom/stage0"
init_from = "outputs/livingroom/stage1/latest.safetensors"

height, width, num_frames = 96, 128, 21
batch_size, num_workers = 2, 0
max_steps, save_every, log_every, eval_every = 100, 50, 20, 100

learning_rate, min_lr, lr_schedule, warmup_steps = 5e-4, 5e-5, "cosine", 20
