"""Demo, stage 1: the geometry branch on the frozen tiny video DiT.   (see demo.sh)"""

preset = "demo"
stage = 1
data_dir = "data/demo"
out_dir = "outputs/demo/stage1"
wan_dir = "outputs/demo/stage0"

height, width, num_frames = 64, 96, 9
batch_size, num_workers = 4, 0
max_steps, save_every, log_every, eval_every = 700, 350, 50, 0

learning_rate, min_lr, lr_schedule, warmup_steps = 1e-3, 1e-4, "cosine", 50
