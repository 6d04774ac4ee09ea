"""A real recording, stage 0: a tiny video DiT, in place of the Wan weights.

ICL-NUIM living room: an 81-frame clip to train on, a 21-frame clip to validate.  The commands are
in docs/evaluation.md; no Wan weights are needed, since stage 0 trains on the clip itself.
"""

preset = "demo"
stage = 0
data_dir = "data/livingroom"
out_dir = "outputs/livingroom/stage0"

height, width, num_frames = 96, 128, 21
batch_size, num_workers = 2, 0
max_steps, save_every, log_every, eval_every = 400, 200, 20, 0

learning_rate, min_lr, lr_schedule, warmup_steps = 1e-3, 1e-4, "cosine", 20
