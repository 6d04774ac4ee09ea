"""Write the miniature's text side and a DiT to start from: `python tiny/make_text.py FOLDER`.

google/umt5-xxl/tokenizer.json splits at words: those of the renderer's captions are one piece each,
others fall apart into letters, and what is no letter into bytes.  models_t5_umt5-xxl-enc-bf16 is
an umT5 of width 64 whose weights are random, of a fixed seed: it tells words and their order apart
and means nothing by them; the DiT learns what they mean.  diffusion_pytorch_model is random too:
the start of stage 0."""

import string
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from encoders import UMT5Encoder  # noqa: E402
from lib.rooms import COLOURS  # noqa: E402
from model import PRESETS  # noqa: E402
from wan import VideoSizes, WanDiT  # noqa: E402

WORDS = """a an the and with of in on at to is are not does no it room rooms empty box boxes sphere
spheres moving ball balls cube cubes wall walls floor ceiling camera move moves turn turns turning
orbit orbits orbiting left right up down forward backward forwards backwards still around slowly
one two three four five six large small big view light dark bright""".split()
PIECES = [*string.ascii_lowercase, *string.digits, *".,;:!?'\"()-", "▁"]


def tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    words = dict.fromkeys([*WORDS, *(word for name in COLOURS for word in name.split())])
    pieces += [(f"▁{word}", -1.0) for word in words]
    pieces += [(piece, -8.0) for piece in PIECES]
    made = Tokenizer(models.Unigram(pieces, unk_id=3, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, len(pieces)


def text_encoder(vocab, dim=64):
    """Random umT5: every map keeps lengths; what is added to a word is half as long as it."""
    torch.manual_seed(0)
    model = UMT5Encoder(vocab, dim, dim, 2 * dim, heads=2, buckets=32, layers=2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                std = 1.0 if "embedding" in name else p.shape[1] ** -0.5
                std *= {"o": 0.5, "fc2": 0.5, "q": 0.3}.get(name.split(".")[-2], 1.0)
                p.normal_(0, std)
    return model


def video_branch():
    torch.manual_seed(0)
    cfg = vars(PRESETS["tiny"])
    return WanDiT(VideoSizes(**{key: cfg[key] for key in vars(VideoSizes())}))


def main(folder):
    made, vocab = tokenizer()
    (folder / "google" / "umt5-xxl").mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "google" / "umt5-xxl" / "tokenizer.json"))
    facts = dict(command="python tiny/make_text.py", seed="0")
    text = {k: v.bfloat16() for k, v in text_encoder(vocab).state_dict().items()}
    save_file(text, folder / "models_t5_umt5-xxl-enc-bf16.safetensors", facts)
    dit = {k: v.contiguous() for k, v in video_branch().state_dict().items()}
    save_file(dit, folder / "diffusion_pytorch_model.safetensors", facts)
    print(f"{folder}: tokenizer of {vocab} pieces, random umT5 and DiT")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)  # --help is no folder
    main(Path(sys.argv[1]))
