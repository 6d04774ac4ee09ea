"""Options, checkpoints and disks as people have them: what cannot run is named at its start."""

import errno
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from small import TINY, command_here, loss_of, options_of, tiny_inputs, tiny_model, train_here

import data
import train
from encoders import MINIATURE, lazy_tensors, wan_sources
from geometry import decode_pose, encode_pose
from lib import evaluate as evaluation
from lib import plan
from lib.checkpoints import load_optimizer, save_checkpoint, training_state
from lib.distributed import Ranks
from lib.evaluate import geometry_row
from lib.experts import files_in
from lib.frozen import frozen_digest, identify_frozen
from lib.jobs import attempt
from lib.log import Passes, Records, provenance
from lib.mix import Mix
from lib.weights import load_trained, metadata_of, read_metadata, read_tensors


def test_the_tilde_of_a_path_is_the_home_folder_for_data_py_too(tmp_path, monkeypatch):
    """bash expands --out ~/x, but not --out=~/x, which made a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    cameras = " ".join(map(str, [0, 1, 1, 0.5, 0.5, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]))
    (tmp_path / "a.txt").write_text(f"{cameras}\n")
    monkeypatch.setattr("sys.argv", ["data.py", "cameras", "~/a.txt", "~/b.npz", "--to=npz"])
    data.command()
    assert (tmp_path / "b.npz").exists()
    monkeypatch.setattr("sys.argv", ["data.py", "verify", "~/none"])
    with pytest.raises(ValueError, match=f"{tmp_path}/none: not a folder"):
        data.command()


def test_a_full_disk_ends_the_encoding_and_is_no_fault_of_a_clip():
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def gone(_):
        raise OSError(errno.ENOENT, "No such file")

    passes = Passes(quiet=True)
    assert passes.each([dict(id="a")], "x", gone) == [] and passes.failed == ["a"]
    with pytest.raises(OSError, match="No space"):
        passes.each([dict(id="b")], "x", full)
    with pytest.raises(OSError, match="No space"):
        attempt(partial(full, 0), "out/a", [])


def test_a_model_that_gives_nan_has_no_row_that_a_mean_leaves_out():
    shape = (1, 5, 8, 12)
    K = torch.tensor([[10.0, 0, 6], [0, 10, 4], [0, 0, 1]]).expand(1, 5, 3, 3)
    b = dict(depth=torch.ones(shape), mask=torch.ones(shape, dtype=torch.bool), intrinsics=K)
    b |= dict(points=torch.ones(*shape, 3), w2c=torch.eye(4)[:3].expand(1, 5, 3, 4))
    out = dict(depth=b["depth"], depth_conf=2 * b["depth"], points=b["points"], velocity=None)
    out |= dict(points_conf=2 * b["depth"], pose_enc=encode_pose(b["w2c"], K, shape[2:])[None])
    rows = [geometry_row(torch.full(shape, math.nan), b["points"], None, b)]
    for name in ("depth", "points", "pose_enc", "depth_conf"):  # its poses alone, say
        wrong = {**out, name: out[name] * math.nan}
        w2c = decode_pose(wrong["pose_enc"][-1], shape[2:])[0]
        rows.append(geometry_row(wrong["depth"], wrong["points"], w2c, b, wrong))
    assert all(set(row.values()) == {math.inf} for row in rows)
    sound = geometry_row(b["depth"], b["points"], b["w2c"], b, out)
    assert sound.keys() == rows[-1].keys() and all(map(math.isfinite, sound.values()))


def test_a_clip_without_known_depth_is_left_out_of_the_baselines(capsys):
    """One of a thousand made every number of a baseline inf."""
    K = torch.tensor([[10.0, 0, 6], [0, 10, 4], [0, 0, 1]]).expand(1, 5, 3, 3)
    still = dict(intrinsics=K, w2c=torch.eye(4)[:3].expand(1, 5, 3, 4))

    def clip(depth):
        depth = torch.full((1, 5, 8, 12), depth)
        return dict(
            still, depth=depth, mask=depth > 0, points=depth[..., None].expand(-1, -1, -1, -1, 3)
        )

    sound = [clip(2.0), clip(3.0)]
    want = evaluation.baselines(sound, sound, evaluation.How(None, 2, 0.1))
    clips = [*sound, clip(0.0)]
    assert evaluation.baselines(clips, clips, evaluation.How(None, 3, 0.1)) == want
    assert all(math.isfinite(value) for row in want.values() for value in row.values())
    alone = evaluation.baselines([clip(0.0)], sound, evaluation.How(None, 2, 0.1))
    assert alone == {evaluation.ORACLE: want[evaluation.ORACLE]}  # not a mean depth of 0
    assert "no fair baseline" in capsys.readouterr().out


def test_provenance_does_not_need_git(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert provenance({})["git"] == "unknown"


def test_bytes_of_a_command_that_are_no_utf8_leave_the_checkpoint_readable(tmp_path):
    state = ({"a": torch.ones(2)}, {"a|step": torch.ones(())})
    save_checkpoint(tmp_path, 1, state, dict(command="x\udcff.py"), keep_last=1)
    assert read_metadata(tmp_path / "step-1.safetensors")["command"] == "x\\udcff.py"


def test_the_state_of_another_optimizer_is_named(tmp_path):
    model = tiny_model(1)
    options = options_of(train, stage=1)
    for saved, asked in (("muon", "adamw"), ("adamw", "muon")):
        optimizer = train.make_optimizer(model, options.replaced(optimizer=saved))
        loss_of(model(**tiny_inputs(), video=False)).backward()
        optimizer.step()
        save_checkpoint(tmp_path, 1, training_state(model, optimizer), {}, keep_last=1)
        other = train.make_optimizer(model, options.replaced(optimizer=asked))
        with pytest.raises(ValueError, match="the state of another --optimizer"):
            load_optimizer(tmp_path / "step-1.optim.safetensors", model, other)
        same = train.make_optimizer(model, options.replaced(optimizer=saved))
        load_optimizer(tmp_path / "step-1.optim.safetensors", model, same)
    trained, beside = [p for p in model.parameters() if p.requires_grad], tmp_path / "a.safetensors"
    for other in (torch.optim.SGD(trained, momentum=0.9), torch.optim.Adam(trained, amsgrad=True)):
        other.step()  # written by a train.py of one's own
        save_file({k: v.contiguous() for k, v in training_state(model, other)[1].items()}, beside)
        with pytest.raises(ValueError, match="the state of another --optimizer"):
            load_optimizer(beside, model, train.make_optimizer(model, options))


NO_MODEL = dict(geo_heads=(0, 5, 64), geo_dim=(1414,), irg_dim=(1164,), bridge_width=(200,))
NO_MODEL |= dict(in_dim=(7, 40), freq_dim=(31,), head_dim=(100,), dpt_features=(12,))
NO_MODEL |= dict(taps=((0, 1),), dpt_channels=((8, 8), (6, 8, 8, 8)))


@pytest.mark.parametrize("key, value", [(k, v) for k, each in NO_MODEL.items() for v in each])
def test_overrides_that_make_no_model_are_named(key, value):
    options = options_of(train, model_overrides={key: value})
    with pytest.raises(ValueError, match="model_overrides: .*(; wanted|is no model's)"):
        train.check_options(options)


def test_a_model_that_computes_otherwise_with_equal_shapes_is_refused(tmp_path):
    for stage in (1, 2):
        config = json.dumps(vars(TINY))
        state = (tiny_model(stage).trainable_state_dict(), {})
        meta = dict(stage=str(stage), model_config=config)
        save_checkpoint(tmp_path, stage, state, meta, keep_last=2)
    for stage, field, value in (
        (1, "taps", (1, 1, 0, 0)),
        (2, "constant_rays", True),
        (2, "irg_heads", 4),
        (2, "camera_iterations", 3),
    ):
        with pytest.raises(
            ValueError, match=f"trained with {field} = .*model_overrides={{'{field}"
        ):
            load_trained(
                tiny_model(stage, **{field: value}), tmp_path / f"step-{stage}.safetensors"
            )
    for free in (
        dict(irg_heads=4),
        dict(exchange="none"),
        dict(head_chunk=4),
        dict(layer_scale=1.0),
    ):
        load_trained(tiny_model(2, **free), tmp_path / "step-1.safetensors")


def test_another_lora_is_another_frozen_branch(tmp_path):
    """At a start, also of eval_only from several, and at a resume; a file that was moved is not."""
    path = str(tmp_path / "lr=1e-4,b8.safetensors")  # one file, whose name holds a comma
    meta = dict(stage="1", step="1", frozen=frozen_digest(MINIATURE), lora="there/a.safetensors")
    save_file({"a": torch.zeros(1)}, path, meta)
    how = dict(stage=1, wan_dir=MINIATURE, init_from=path)
    options, sources, origin = train.settled(options_of(train, **how))
    assert options.lora == origin["lora"] == meta["lora"] and sources == [path]
    train.check_options(options)
    for moved in ("a.safetensors", "C:\\here\\a.safetensors"):
        assert identify_frozen(options.replaced(lora=moved), sources, True) == meta["frozen"]
    for lora in ("", "b.safetensors"):
        other = options.replaced(lora=lora)
        with pytest.raises(ValueError, match="trained with --lora=there/a.*other_wan"):
            identify_frozen(other, sources, True)
        assert identify_frozen(other.replaced(other_wan=True), sources, True)
        again = dict(options=other, world=1, frozen=meta["frozen"], clips={})
        with pytest.raises(ValueError, match="trained with --lora=there/a"):
            train.resume_from(path, None, None, **again)


def test_a_user_without_a_name_and_a_home_trains(monkeypatch):
    """docker run --user 12345 with an empty environment: Could not determine home directory."""
    want = frozen_digest(MINIATURE)

    def nobody(_):
        raise KeyError("getpwuid(): uid not found: 12345")

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert frozen_digest(MINIATURE) == want


def test_a_list_of_checkpoints_may_be_longer_than_a_file_s_name_may_be():
    """eval_only of fourteen in one folder was 'File name too long'."""
    names = [f"step-{n}00000.safetensors" for n in range(14)]
    assert files_in(",".join(names)) == names and files_in("") == []


def test_no_way_in_of_a_weight_file_waits_for_a_pipe(tmp_path):
    """mkfifo, or <(...) of a shell: sample.py --ckpt and train.py --init_from hung."""
    signal.alarm(30)  # ends what waits, and the tests with it
    for name in ("a.safetensors", "a.pth"):
        os.mkfifo(tmp_path / name)
        for read in (metadata_of, read_tensors, lazy_tensors):
            with pytest.raises(ValueError, match=f"{name}: a pipe or a folder; name a file"):
                read(str(tmp_path / name))
    os.mkfifo(tmp_path / "diffusion_pytorch_model.safetensors.index.json")
    with pytest.raises(ValueError, match="index.json: a pipe or a folder"):
        wan_sources(tmp_path)
    signal.alarm(0)


def test_the_numbers_of_an_evaluation_are_json_where_some_are_not_known(tmp_path, monkeypatch):
    """No reader of other languages takes NaN or Infinity."""
    rows = {"fair": dict(abs_rel=0.5, tae=math.nan, trans=math.inf)}
    monkeypatch.setattr(evaluation, "baselines", lambda *_: rows)
    evaluation.evaluate_only(None, dict(train=[], val=[]), tmp_path, [], evaluation.How(None, 1, 1))
    found = json.loads((tmp_path / "eval.json").read_text(), parse_constant=pytest.fail)
    assert found == {"fair": dict(abs_rel=0.5, tae=None, trans=None)}


def test_a_dataset_that_grew_shrank_or_has_others_is_told_at_a_resume(tmp_path):
    """The order of the clips is another one from there on."""
    model, options = tiny_model(1), options_of(train, stage=1)
    optimizer = train.make_optimizer(model, options)
    loss_of(model(**tiny_inputs(), video=False)).backward()
    optimizer.step()

    class Part(list):
        metadata = property(lambda self: {name: dict(crc=self.crc) for name in self})
        crc = "11111111 of the values, then the header's"
        empty_text = tmp_path / "cache" / "text"

    def told(names):
        return Mix([Part(names)], [1]).told

    meta = dict(train_config=json.dumps(vars(options) | told("abc")), stage="1")
    save_checkpoint(tmp_path, 1, training_state(model, optimizer), meta, keep_last=1)
    fewer = ["clips [3] -> [2]", "clip_names", "clip_values"]
    for names, words in (("ab", fewer), ("abd", ["clip_names"])):
        how = dict(options=options, world=1, frozen="", clips=told(names))
        path = f"{tmp_path}/step-1.safetensors"
        remarks = train.resume_from(path, model, optimizer, **how)[2]
        assert len(remarks) == len(words), remarks
        assert all(f"changed since step 1: {w}" in r for r, w in zip(remarks, words)), remarks
    assert train.resume_from(path, model, optimizer, **how | dict(clips=told("abc")))[2] == []
    Part.crc = "22222222"  # rendered sets share their names: another one in its place
    (found,) = train.resume_from(path, model, optimizer, **how | dict(clips=told("abc")))[2]
    assert found.startswith("changed since step 1: clip_values")


def test_python_without_docstrings_has_its_commands(monkeypatch):
    """python -OO: every command of data.py was a traceback."""
    monkeypatch.setattr(data, "__doc__", None)
    assert data.make_parser().parse_args(["verify", "a"]).root == "a"


def test_what_a_run_cannot_start_from_is_refused():
    ckpt = "tiny/fantasyworld.safetensors"
    code, _ = train_here("config/tiny1.py", f"--init_from={ckpt},{ckpt}")
    assert "several checkpoints are for eval_only" in str(code)
    code, text = command_here("train.py", "--check")
    assert code == 2 and "--check: wanted checkpoints" in text


def test_what_spread_weights_and_an_expert_alone_cannot_do_is_refused_and_not_planned():
    spread, half = dict(shard_weights=True), dict(eval_samples=1)
    zero = [
        dict(stage=0, **how) for how in (dict(compile=True), dict(checkpoint_activations="full"))
    ]
    for wrong in (*zero, spread | dict(stage=0), spread | half, half | dict(expert="high")):
        with pytest.raises(ValueError, match="leave (one of the two|it) out"):
            train.check_options(options_of(train, plan=True, **wrong))
    ways = {stage: {how for _, how in plan.ways(["none"], 8, stage)} for stage in (0, 1)}
    assert "weights" in ways[1] - ways[0]


def test_a_run_that_evaluates_nothing_loads_no_encoder_for_samples():
    never = options_of(train, eval_samples=1, eval_every=0, wan_dir="nowhere")
    assert train.how_to_evaluate(never, None, Ranks()).draw is None
    for asked in (dict(eval_every=1), dict(eval_only=True)):
        with pytest.raises(ValueError, match="nowhere"):  # there it does
            train.how_to_evaluate(never.replaced(**asked), None, Ranks())


def test_the_usual_noise_level_of_an_evaluation_is_one_that_is_trained():
    def level(**given):
        return train.how_to_evaluate(options_of(train, **given), None, Ranks()).eval_sigma

    assert level(eval_sigma=0.95) == 0.95 and level(expert="low", eval_sigma=0.5) == 0.5
    assert level(expert="low", eval_sigma=0.95) == level(expert="high", eval_sigma=0.1) == 0.9


def test_a_plan_for_gpus_that_cannot_share_the_batch_says_so():
    size = ["--num_frames=5", "--height=32", "--width=48", f"--model_overrides={vars(TINY)}"]
    code, text = train_here("config/tiny0.py", *size, "--plan", "--plan_gpus=3")
    assert code == 0 and "cannot share a global batch of" in text


def test_commands_start_from_any_folder_as_modules_and_under_safe_paths_as_the_readme_says(
    tmp_path,
):
    """python -P train.py: No module named 'config'."""
    root = pathlib.Path(train.__file__).parent
    assert "(`-P`, PYTHONSAFEPATH): `export PYTHONPATH=$PWD`" in (root / "README.md").read_text()
    safe = dict(PYTHONSAFEPATH="1", PYTHONPATH=str(root))
    for place, words, more in (
        (tmp_path, [str(root / "train.py")], {}),
        (root, ["-m", "train"], {}),
        (root, ["train.py"], safe),
    ):
        command, env = [sys.executable, *words, "--max_steps=0"], os.environ | more
        ended = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended
        assert ended.stderr.startswith("train.py: command line: max_steps = 0"), ended


def test_the_time_that_is_left_is_told_in_hours_of_whatever_number():
    """1 day, 3:46:41 left: two forms in one column of training.log."""
    records = Records(None, {}, 0)
    records.since -= 10000.5
    assert (records.clock(), records.clock(10)) == ("2:46:40", "27:46:45")


def test_curves_of_a_run_that_went_on_under_an_earlier_clock_are_right(tmp_path, monkeypatch):
    """TensorBoard reads its files by their names, and lost all of the later one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    now, wanted = time.time(), {}
    for first, clock in ((0, now), (2, now - 3600), (3, now - 7200), (4, now + 10)):
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        records = Records(tmp_path, {}, first)
        for step in range(first + 1, first + 4):
            records.scalars(step, {"loss": first})
            wanted[step] = first
        records.flush()
    names = {path.name[:6] for path in (tmp_path / "tensorboard").iterdir()}
    assert names == {"000000", "000001", "events"}  # renamed only where the clock went back
    curve = EventAccumulator(str(tmp_path / "tensorboard"))
    curve.Reload()
    assert {event.step: event.value for event in curve.Scalars("loss")} == wanted
