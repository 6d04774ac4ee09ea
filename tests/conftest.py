"""The suite runs from any folder."""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)   # two threads on two shared cores made a small training loop 15 times slower
