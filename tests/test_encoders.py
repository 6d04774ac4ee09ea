"""Wan's frozen encoders against golden outputs of the official code; loading, streaming, prompts.

Golden files: vae_tiny.pt (4.5 MB), t5_tiny.pt (0.8 MB), clip_tiny.pt (1.5 MB), wan_ckpt_keys.py (8
kB)."""

import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import encoders
from encoders import CLIPVision, PromptTokenizer, UMT5Encoder, WanVAE, clean_prompt, load_state_dict

GOLDEN = Path(__file__).parent / "golden"


def golden(name):
    return torch.load(GOLDEN / name, weights_only=True)


def relative_error(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def official_shapes(release):
    spec = importlib.util.spec_from_file_location("wan_ckpt_keys", GOLDEN / "wan_ckpt_keys.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        name: torch.empty(shape, device="meta") for name, shape in module.FAM[release][0].items()
    }


@pytest.fixture(scope="module")
def vae_golden():
    data = golden("vae_tiny.pt")
    return WanVAE.from_state_dict(data["state_dict"]), data


# --- VAE. 1e-4: one-shot and stepwise forms differ by 5e-6 already (fp32 sums in another order).


@pytest.mark.parametrize("T", [1, 5, 9, 17])
def test_vae_encodes_and_decodes_as_the_official_code(vae_golden, T):
    vae, data = vae_golden
    latents, video = data["latents"][T], data["decoded"][T].clamp(-1, 1)
    torch.testing.assert_close(vae.encode(data["videos"][T]), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.decode(latents), video, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk", [2, 3, None])
def test_chunk_size_changes_neither_latents_nor_video(vae_golden, chunk):
    vae, data = vae_golden
    video, latents, pixel_chunk = data["videos"][17], data["latents"][17], chunk and 4 * chunk
    torch.testing.assert_close(
        vae.encode(video, chunk=pixel_chunk), vae.encode(video), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        vae.decode(latents, chunk=chunk), vae.decode(latents), atol=1e-5, rtol=0
    )


def test_vae_treats_the_clips_of_a_batch_alone_and_leaves_its_input_as_it_was(vae_golden):
    vae, data = vae_golden
    clips = torch.cat([data["videos"][9], data["videos"][9].flip(2)])
    before = clips.clone()
    torch.testing.assert_close(vae.encode(clips)[:1], data["latents"][9], atol=1e-4, rtol=0)
    assert torch.equal(clips, before)


def test_later_frames_do_not_change_earlier_latents(vae_golden):
    vae, data = vae_golden
    video = data["videos"][17]
    torch.testing.assert_close(vae.encode(video[:, :, :9]), vae.encode(video)[:, :, :3])


def test_a_call_that_fails_half_way_leaves_no_trace_in_the_next(vae_golden):
    vae, data = vae_golden
    want, calls = vae.encode(data["videos"][9]), []

    def fail_on_second_step(*_):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")

    hook = vae.encoder.middle[0].register_forward_pre_hook(fail_on_second_step)
    with pytest.raises(RuntimeError, match="out of memory"):
        vae.encode(data["videos"][9])
    hook.remove()
    assert torch.equal(vae.encode(data["videos"][9]), want)


def test_vae_in_bf16_stays_near_fp32_and_returns_fp32(vae_golden):
    _, data = vae_golden
    vae = WanVAE.from_state_dict(
        {name: value.bfloat16() for name, value in data["state_dict"].items()}
    )
    latents, video = vae.encode(data["videos"][5]), vae.decode(data["latents"][5])
    assert latents.dtype == video.dtype == torch.float32
    # 8 bits of mantissa through some 30 layers
    assert relative_error(latents, data["latents"][5]) < 0.03
    assert relative_error(video, data["decoded"][5].clamp(-1, 1)) < 0.03


@pytest.mark.parametrize(
    "shape, chunk", [((1, 3, 4, 8, 8), 4), ((1, 3, 5, 12, 8), 4), ((1, 3, 5, 8, 8), 6)]
)
def test_vae_names_a_clip_or_chunk_it_cannot_take(vae_golden, shape, chunk):
    with pytest.raises(ValueError, match="4k"):
        vae_golden[0].encode(torch.zeros(shape), chunk=chunk)


class LiveBytes(TorchDispatchMode):
    """Peak bytes of the storages that operations make and something still holds."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def working_bytes(call, x):
    with LiveBytes() as meter:
        out = call(x)
    return meter.peak - out.nbytes - x.nbytes  # slices of x hold its storage


def test_working_memory_does_not_grow_with_the_number_of_frames(vae_golden):
    vae, _ = vae_golden
    short, long = torch.zeros(1, 16, 3, 4, 4), torch.zeros(1, 16, 9, 4, 4)
    assert working_bytes(vae.decode, long) < 1.01 * working_bytes(vae.decode, short)
    one_shot = working_bytes(lambda latents: vae.decode(latents, chunk=None), long)
    assert one_shot > 1.5 * working_bytes(vae.decode, long)
    short, long = torch.zeros(1, 3, 9, 32, 32), torch.zeros(1, 3, 33, 32, 32)
    assert working_bytes(vae.encode, long) < 1.01 * working_bytes(vae.encode, short)


# --- Text and images. 1e-5 relative: fp32, other summation order.


def test_umt5_equals_the_official_encoder_and_is_zero_at_padding():
    data = golden("t5_tiny.pt")
    out = UMT5Encoder.from_state_dict(data["state_dict"])(data["ids"], data["mask"])
    for row, want in zip(out, data["trimmed"]):
        assert relative_error(row[: len(want)], want) < 1e-5
        assert (row[len(want) :] == 0).all()


def full_length_umt5(sd, ids, mask, heads):
    """All positions computed, padding hidden by a mask: the T5 paper's formulas, in sd's type."""
    x, L = sd["token_embedding.weight"][ids], ids.shape[1]
    bucket, norm = encoders.relative_buckets(torch.arange(L), 32), torch.nn.functional.rms_norm
    for i in range(sum(name.endswith("norm1.weight") for name in sd)):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in sd.items()}
        bias = w["pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        y = norm(x, x.shape[-1:], w["norm1.weight"], 1e-6)
        q, k, v = (
            (y @ w[f"attn.{n}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2) for n in "qkv"
        )
        scores = q @ k.transpose(-1, -2) + bias
        scores = scores.masked_fill(~mask.bool()[:, None, None], -torch.inf)
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + y @ w["attn.o.weight"].T
        y = norm(x, x.shape[-1:], w["norm2.weight"], 1e-6)
        gate = torch.nn.functional.gelu(y @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return norm(x, x.shape[-1:], sd["norm.weight"], 1e-6) * mask[..., None]


def test_umt5_computes_tokens_alone_and_gives_what_the_full_length_gives():
    torch.manual_seed(0)
    sizes = dict(vocab=64, dim=32, attn_dim=32, ffn_dim=64, heads=4, layers=2)
    model = UMT5Encoder(**sizes).double()
    ids, mask = torch.randint(64, (7, 512)), torch.zeros(7, 512)
    for row, length in zip(mask, [1, 40, 511, 512, 40]):
        row[:length] = 1
    mask[5] = torch.rand(512) < 0.2  # with holes: positions stay those of the whole row
    out, want = model(ids, mask), full_length_umt5(model.state_dict(), ids, mask, 4)
    torch.testing.assert_close(out[:6], want[:6], rtol=1e-12, atol=1e-12)
    assert out.shape == (7, 512, 32) and (out[6] == 0).all()  # a row without any token
    torch.testing.assert_close(model(ids), full_length_umt5(model.state_dict(), ids, mask >= 0, 4))

    def flops(length):
        with FlopCounterMode(display=False) as counter:
            model(ids[:1], (torch.arange(512) < length).int()[None])
        return counter.get_total_flops()

    assert flops(512) == 12.8 * flops(40)  # the CPU's attention, saved 164 times, is not counted


def test_umt5_in_bf16_is_as_near_to_fp32_as_the_official_bf16():
    data = golden("t5_tiny.pt")
    sd = {name: value.bfloat16() for name, value in data["state_dict"].items()}
    out = UMT5Encoder.from_state_dict(sd)(data["ids"], data["mask"])
    assert out.dtype == torch.bfloat16
    want = torch.cat(data["trimmed"])
    assert relative_error(out[data["mask"].bool()], want) < 1.2 * relative_error(
        data["trimmed_bf16"], want
    )


def test_relative_buckets_by_hand():
    row = encoders.relative_buckets(torch.arange(200), 32)[100]  # key - query from -100 to 99
    distance = [0, 1, 7, 8, 11, 12, 16, 32, 64, 90, 91, 99]  # 8 * 2 ** (k / 2) starts bucket 8 + k
    bucket = [0, 1, 7, 8, 8, 9, 10, 12, 14, 14, 15, 15]
    assert [row[100 - d].item() for d in distance] == bucket
    assert [row[100 + d].item() for d in distance[1:]] == [16 + b for b in bucket[1:]]


@pytest.mark.parametrize("prefix", ["", "visual.", "model.visual."])
def test_clip_equals_the_official_tower_but_for_its_last_block(prefix):
    data = golden("clip_tiny.pt")
    sd = {prefix + name: value for name, value in data["state_dict"].items()}
    if prefix:
        other = prefix.removesuffix("visual.")
        sd |= {other + "log_scale": torch.zeros(()), other + "textual.norm.weight": torch.zeros(4)}
    tower = CLIPVision.from_state_dict(sd, num_heads=data["config"]["num_heads"])
    mean, std = (
        torch.tensor(stat).view(3, 1, 1) for stat in (encoders.CLIP_MEAN, encoders.CLIP_STD)
    )
    images = (data["images"] * std + mean) * 2 - 1  # the golden input is past the normalisation
    assert relative_error(tower(images), data["out_fp32"]) < 1e-5


def test_clip_takes_any_image_size_and_rejects_unknown_tensors():
    sd = golden("clip_tiny.pt")["state_dict"]
    assert CLIPVision.from_state_dict(sd, num_heads=4)(torch.zeros(1, 3, 48, 80)).shape == (
        1,
        257,
        64,
    )
    with pytest.raises(ValueError, match="CLIP vision tower.*1 unexpected .'head_2'"):
        CLIPVision.from_state_dict(sd | {"head_2": torch.zeros(1)}, num_heads=4)


# --- Loading.


@pytest.mark.parametrize(
    "model, release",
    [(WanVAE, "Wan2.1_VAE.pth"), (CLIPVision, "CLIP .pth"), (UMT5Encoder, "umt5-xxl encoder .pth")],
)
def test_the_official_names_and_shapes_load_and_the_tensors_are_shared(model, release):
    sd = official_shapes(release)
    loaded = model.from_state_dict(sd)
    parameter = next(loaded.parameters())
    assert parameter.untyped_storage()._cdata in {
        value.untyped_storage()._cdata for value in sd.values()
    }
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("model, name", [(WanVAE, "vae_tiny.pt"), (UMT5Encoder, "t5_tiny.pt")])
def test_missing_unexpected_and_foreign_tensors_are_named_with_the_file_that_was_wanted(
    model, name
):
    sd = golden(name)["state_dict"]
    assert set(model.from_state_dict({"model." + key: sd[key] for key in sd}).state_dict()) == set(
        sd
    )
    last, family, odd = list(sd)[-1], name.removesuffix("_tiny.pt"), torch.zeros(7, 7)
    for change, complaint in [
        ({last: None}, f"1 missing .'{last}'"),
        ({"spare": odd}, "1 unexpected .'spare'"),
        ({last: odd}, rf"{last} is \(7, 7\)"),
    ]:
        broken = {key: value for key, value in (sd | change).items() if value is not None}
        with pytest.raises(ValueError, match=f"(?i)not a .*{family}.*{complaint}"):
            model.from_state_dict(broken)
    with pytest.raises(
        ValueError,
        match="(?i)sizes cannot be read.*Found 1 tensors: patch_embedding.weight.*other names",
    ):
        model.from_state_dict({"patch_embedding.weight": torch.zeros(1)})


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_files_round_trip_and_a_truncated_one_is_named(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    sd = {"a": torch.arange(40_000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_file(sd, path) if suffix == "safetensors" else torch.save(sd, path)
    assert all(torch.equal(value, sd[name]) for name, value in load_state_dict(path).items())
    for size in (path.stat().st_size // 2, 5, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(
            ValueError, match=f"weights.{suffix}: {size:,} bytes that cannot be read"
        ):
            load_state_dict(path)


def test_files_that_are_absent_or_hold_other_things_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_state_dict(tmp_path / "absent.pth")
    for content in ([1, 2], {"step": 3}, {}, {"path": Path("x")}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth.*dict of"):
            load_state_dict(tmp_path / "other.pth")


# --- Prompts.


def test_prompt_clean_up():
    assert clean_prompt("  a &amp;amp; b\n\t c &lt;d&gt; ") == "a & b c <d>"
    # same with and without ftfy
    assert clean_prompt("色调艳丽，过曝　“静态”") == '色调艳丽,过曝 "静态"'
    assert clean_prompt(" \n") == ""


def tokenizer_folder(folder, appends_end):
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(600))]
    end = {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "</s>", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
    }
    special = [
        {
            "id": i,
            "content": word,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for i, word in enumerate(words[:3])
    ]
    model = {
        "type": "WordLevel",
        "vocab": {word: i for i, word in enumerate(words)},
        "unk_token": "<unk>",
    }
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "truncation": cut,
                "padding": None,
                "added_tokens": special,
                "normalizer": None,
                "pre_tokenizer": {"type": "WhitespaceSplit"},
                "post_processor": end if appends_end else None,
                "decoder": None,
                "model": model,
            }
        )
    )
    return folder


@pytest.mark.parametrize("appends_end", [True, False])
def test_prompts_end_in_one_end_token_and_long_ones_keep_it(tmp_path, appends_end):
    long = " ".join(f"w{i}" for i in range(600))
    tokenizer = PromptTokenizer(tokenizer_folder(tmp_path, appends_end))
    ids, mask = tokenizer(["w0  &#119;1", "", long, "w5 </s> w6"])
    assert ids.shape == mask.shape == (4, 512) and ids.dtype == mask.dtype == torch.int64
    assert ids[0].tolist() == [3, 4, 1] + [0] * 509
    assert ids[2].tolist() == [*range(3, 514), 1]
    assert ids[3, :5].tolist() == [8, 1, 9, 1, 0]
    assert mask.sum(1).tolist() == [3, 1, 512, 4] and (mask.diff(dim=1) <= 0).all()


def test_an_absent_broken_or_foreign_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: cannot be read"):
        PromptTokenizer(tmp_path)
    path = tokenizer_folder(tmp_path, True) / "tokenizer.json"
    text = path.read_text()
    for content, complaint in [
        (text[:99], "cannot be read"),
        (text.replace("<pad>", "<s>"), "not umT5's"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer.json: {complaint}"):
            PromptTokenizer(tmp_path)
