"""A real recording, stage 1: ICL-NUIM living room, 81-frame clip to train on, 21-frame clip to
validate. No Wan weights needed: a tiny video DiT is trained on the clip itself.

    python ../shared/livingroom/make_dataset.py data/livingroom python data.py encode
    data/livingroom --codec transform --height 96 --width 128 --num_frames 21 --windows 16 python
    train.py config/livingroom0.py && python train.py config/livingroom1.py && python train.py
    config/livingroom2.py
"""

preset = "demo"
stage = 1
data_dir = "data/livingroom"
out_dir = "outputs/livingroom/stage1"
wan_dir = "outputs/livingroom/stage0"

height, width, num_frames = 96, 128, 21
batch_size, num_workers = 2, 0
max_steps, save_every, log_every, eval_every = 300, 100, 20, 100

learning_rate, min_lr, lr_schedule, warmup_steps = 1e-3, 1e-4, "cosine", 20
