"""One rendered recording, written in the layout of each dataset and tool that is imported."""

import json
import zipfile

import numpy as np
import torch

from geometry import inv_se3, mat_to_quat
from lib import camera_files
from lib.pictures import write_png, write_video
from lib.rooms import render_clip

T, H, W = 9, 48, 64
NED = np.array([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])  # north east down -> OpenCV


def clip(seed=3):
    """rgb, depth in whole millimetres (metres, float32), w2c (T, 3, 4), k (4,) pixels."""
    made = render_clip(seed, T, H, W, "simple")
    k = made["intrinsics"]
    depth = np.round(made["depth"] * 1000).astype(np.uint16)
    # A recording's world is anywhere.
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    world = np.concatenate([turn, [[0.3], [-2], [5]]], 1)
    w2c = made["w2c"] @ np.concatenate([world, [[0, 0, 0, 1]]])
    return dict(rgb=made["rgb"], mm=depth, w2c=w2c, k=np.array([k[0, 0], k[1, 1], W / 2, H / 2]))


def c2w_of(c):
    return camera_files.homogeneous(inv_se3(torch.from_numpy(c["w2c"])).numpy())


def seven(c2w):
    """t and quaternion xyzw."""
    turn = mat_to_quat(torch.from_numpy(c2w[:, :3, :3].copy())).numpy()
    return np.concatenate([c2w[:, :3, 3], turn], 1)


def k3(c):
    return np.array([[c["k"][0], 0, c["k"][2]], [0, c["k"][1], c["k"][3]], [0, 0, 1]])


def lens_of(c):
    """(T, 4) fractions."""
    return np.tile(c["k"] / [W, H, W, H], (T, 1))


def pictures(folder, c, name="{:06d}.png", first=0):
    folder.mkdir(parents=True, exist_ok=True)
    for t, frame in enumerate(c["rgb"]):
        write_png(folder / name.format(t + first), frame)


def counts(folder, c, name="{:06d}.png", factor=1, first=0, most=None):
    folder.mkdir(parents=True, exist_ok=True)
    for t, mm in enumerate(c["mm"]):
        raw = (mm * factor).astype(np.uint16)
        if most is not None:
            raw[:4, :4] = most
        write_png(folder / name.format(t + first), raw)


def sevenscenes(src, c):
    pictures(src / "seq-01", c, "frame-{:06d}.color.png")
    counts(src / "seq-01", c, "frame-{:06d}.depth.png", most=65535)
    for t, m in enumerate(c2w_of(c)):
        np.savetxt(src / "seq-01" / f"frame-{t:06d}.pose.txt", m)
    np.savetxt(src / "camera-intrinsics.txt", k3(c))


def scannet(src, c):
    pictures(src / "color", c, "{}.png")
    counts(src / "depth", c, "{}.png")
    (src / "pose").mkdir()
    (src / "intrinsic").mkdir()
    for t, m in enumerate(c2w_of(c)):
        np.savetxt(src / "pose" / f"{t}.txt", np.full((4, 4), -np.inf) if t == 4 else m)
    for name in ("color", "depth"):
        full = np.eye(4)
        full[:3, :3] = k3(c)
        np.savetxt(src / "intrinsic" / f"intrinsic_{name}.txt", full)


def tum(src, c):
    times = 1305031102.1 + np.arange(T) / 30
    pictures(src / "rgb", c)
    counts(src / "depth", c, factor=5)
    for kind, late in (("rgb", 0), ("depth", 0.007)):
        rows = [f"{x + late:.6f} {kind}/{t:06d}.png" for t, x in enumerate(times)]
        (src / f"{kind}.txt").write_text("# comment\n" + "\n".join(rows) + "\n")
    # Poses come oftener, at other times, and end before the pictures do.
    stamps = np.concatenate([times[:-1] - 0.004, times[:-1] + 0.011])
    rows = np.concatenate([stamps[:, None], np.tile(seven(c2w_of(c))[:-1], (2, 1))], 1)
    np.savetxt(
        src / "groundtruth.txt", rows[np.argsort(stamps)], header="timestamp tx ty", fmt="%.8f"
    )


def tartanair(src, c):
    pictures(src / "image_left", c, "{:06d}_left.png")
    (src / "depth_left").mkdir()
    for t, mm in enumerate(c["mm"]):
        depth = (mm / 1000).astype(np.float32)
        depth[:3, :3] = 10000  # sky
        np.save(src / "depth_left" / f"{t:06d}_left_depth.npy", depth)
    ned = c2w_of(c)
    ned[:, :3, :3] = NED.T @ ned[:, :3, :3] @ NED
    ned[:, :3, 3] = ned[:, :3, 3] @ NED
    np.savetxt(src / "pose_left.txt", seven(ned))


def vkitti2(src, c):
    pictures(src / "frames/rgb/Camera_0", c, "rgb_{:05d}.png")
    counts(src / "frames/depth/Camera_0", c, "depth_{:05d}.png", factor=0.1, most=65535)
    full = camera_files.homogeneous(c["w2c"])
    for name, head, row in (
        ("extrinsic", "frame cameraID r1,1", lambda t: full[t].ravel()),
        ("intrinsic", "frame cameraID K[0,0] K[1,1]", lambda t: c["k"]),
    ):
        rows = [[t, cam, *(row(t) + 9 * cam)] for t in range(T) for cam in (0, 1)]
        np.savetxt(src / f"{name}.txt", rows, header=head, comments="")


def wildrgbd(src, c):
    pictures(src / "rgb", c, "{:05d}.png")
    counts(src / "depth", c, "{:05d}.png")
    rows = np.concatenate([np.arange(T)[:, None], c2w_of(c).reshape(T, 16)], 1)
    np.savetxt(src / "cam_poses.txt", rows[::-1])  # by index, not by place
    (src / "metadata").write_text(json.dumps(dict(K=k3(c).T.ravel().tolist(), w=W, h=H)))


def omniworld(src, c):
    pictures(src / "color", c)
    z = c["mm"].astype(float) / 1000 * 0.004
    d = np.round(65535 * 1000 * z / (1 + 999 * z)).astype(np.uint16)
    counts(src / "depth", dict(c, mm=d))
    (src / "camera").mkdir()
    (src / "split_info.json").write_text(json.dumps(dict(split_num=1, split=[list(range(T))])))
    turn = mat_to_quat(torch.from_numpy(c["w2c"][:, :, :3].copy())).numpy()[:, [3, 0, 1, 2]]
    said = dict(quats=turn.tolist(), trans=c["w2c"][:, :, 3].tolist())
    said |= dict(focals=[c["k"][0]] * T, cx=W / 2, cy=H / 2)
    (src / "camera" / "split_0.json").write_text(json.dumps(said))


def replica(src, c):
    pictures(src / "office0/results", c, "frame{:06d}.png")
    counts(src / "office0/results", c, "depth{:06d}.png", factor=6)
    np.savetxt(src / "office0/traj.txt", c2w_of(c).reshape(T, 16))
    fx, fy, cx, cy = c["k"].tolist()
    camera = dict(w=W, h=H, fx=fx, fy=fy, cx=cx - 0.5, cy=cy - 0.5, scale=6000.0)
    (src / "cam_params.json").write_text(json.dumps(dict(camera=camera)))


def kitti(src, c):
    pictures(src / "images", c, "{}.png", first=8)  # 8 .. 16: string order is another
    counts(src / "depth", c, "{}.png", first=8)
    np.savetxt(src / "poses.txt", c2w_of(c)[:, :3].reshape(T, 12))
    np.savetxt(src / "K.txt", k3(c))


def redwood(src, c):
    pictures(src / "color", c, "{:05d}.png")
    counts(src / "depth", c, "{:05d}.png")
    lines = []
    for t, m in enumerate(c2w_of(c).tolist()):
        lines += [f"{t} {t} {t + 1}", *(" ".join(map(repr, row)) for row in m)]
    (src / "trajectory.log").write_text("\n".join(lines) + "\n")
    k = k3(c)
    k[:2, 2] -= 0.5
    said = dict(width=W, height=H, intrinsic_matrix=k.T.ravel().tolist())
    (src / "camera_intrinsic.json").write_text(json.dumps(said))


def nerfstudio(src, c):
    pictures(src / "images", c, "f{}.png")
    counts(src / "depths", c, "f{}.png")
    camera_files.write(src / "transforms.json", "nerfstudio", c["w2c"], lens_of(c), (H, W))
    said = json.loads((src / "transforms.json").read_text())
    for t, frame in enumerate(said["frames"]):
        frame.update(file_path=f"images/f{t}.png", depth_file_path=f"depths/f{t}.png")
    (src / "transforms.json").write_text(json.dumps(said))


def blender(src, c):
    """A split of a scene: the field of view is all that is said, and pictures lack their ending."""
    nerfstudio(src, c)
    said = json.loads((src / "transforms.json").read_text())
    kept = ("transform_matrix", "file_path", "depth_file_path")
    frames = [{key: frame[key] for key in kept} for frame in said["frames"]]
    for frame in frames:
        frame["file_path"] = f"./{frame['file_path'].removesuffix('.png')}"
    angle = 2 * np.arctan(W / 2 / c["k"][0])
    (src / "transforms.json").unlink()
    text = json.dumps(dict(camera_angle_x=angle, frames=frames))
    (src / "transforms_test.json").write_text(text)


def colmap(src, c):
    pictures(src / "images", c, "frame_{:05d}.png")
    write_png(src / "images" / "frame_00099.png", c["rgb"][0])  # not registered
    counts(src / "depth", c, "frame_{:05d}.png")
    intrinsics = lens_of(c)
    camera_files.write(src / "sparse/0", "colmap", c["w2c"], intrinsics, (H, W), binary=True)
    camera_files.write(src / "sparse/1", "colmap", c["w2c"][:2], intrinsics[:2], (H, W))


def re10k(src, c):
    pictures(src / "abc", c, "{}.png", first=0)
    for t in range(T):
        (src / "abc" / f"{t}.png").rename(src / "abc" / f"{52553000 + 33367 * t}.png")
    lines = []
    for t, (k, e) in enumerate(zip(lens_of(c), c["w2c"])):
        numbers = " ".join(f"{x:.9g}" for x in (*k, 0, 0, *e.ravel()))
        lines.append(f"{52553000 + 33367 * t} {numbers}")
    text = "\n".join(lines)
    (src / "abc.txt").write_text("https://www.youtube.com/watch?v=abc\n" + text + "\n")


def exr(depth):
    """Depth (H, W) as OpenEXR: one channel Z of halves, not compressed."""
    import struct

    def attribute(name, kind, value):
        return name.encode() + b"\0" + kind.encode() + b"\0" + struct.pack("<i", len(value)) + value

    h, w = depth.shape
    channel = b"Z\0" + struct.pack("<iiii", 1, 0, 1, 1) + b"\0"
    window = struct.pack("<iiii", 0, 0, w - 1, h - 1)
    head = b"\x76\x2f\x31\x01" + struct.pack("<i", 2) + attribute("channels", "chlist", channel)
    head += attribute("compression", "compression", b"\0") + attribute(
        "dataWindow", "box2i", window
    )
    head += attribute("displayWindow", "box2i", window) + attribute("lineOrder", "lineOrder", b"\0")
    head += attribute("pixelAspectRatio", "float", struct.pack("<f", 1))
    head += attribute("screenWindowCenter", "v2f", struct.pack("<ff", 0, 0))
    head += attribute("screenWindowWidth", "float", struct.pack("<f", 1)) + b"\0"
    rows = [struct.pack("<ii", y, 2 * w) + depth[y].astype("<f2").tobytes() for y in range(h)]
    first = len(head) + 8 * h
    places = [first + y * (8 + 2 * w) for y in range(h)]
    return head + struct.pack(f"<{h}Q", *places) + b"".join(rows)


def vipe(src, c):
    for name in ("rgb", "pose", "intrinsics", "depth"):
        (src / name).mkdir()
    write_video(src / "rgb/walk.mp4", c["rgb"], 24, crf=4)
    inds = np.array([t for t in range(T) if t != 3])  # one frame has no pose
    np.savez(src / "pose/walk.npz", data=c2w_of(c)[inds].astype(np.float32), inds=inds)
    np.savez(src / "intrinsics/walk.npz", data=np.tile(c["k"], (T, 1)), inds=np.arange(T))
    (src / "intrinsics/walk_camera.txt").write_text("".join(f"{t}: PINHOLE\n" for t in range(T)))
    with zipfile.ZipFile(src / "depth/walk.zip", "w") as archive:
        for t, mm in enumerate(c["mm"]):
            archive.writestr(f"{t:05d}.exr", exr(mm / 1000))


def da3(src, c):
    k = np.tile(k3(c), (T, 1, 1))
    depth = (c["mm"] / 1000).astype(np.float32)
    more = dict(extrinsics=c["w2c"], intrinsics=k, conf=np.ones_like(depth))
    np.savez(src / "results.npz", depth=depth, image=c["rgb"], **more)


def megasam(src, c):
    depth = (c["mm"] / 1000).astype(np.float16)
    more = dict(cam_c2w=c2w_of(c), intrinsic=k3(c))
    np.savez(src / "walk_sgd_cvd_hr.npz", images=c["rgb"], depths=depth, **more)


def metres(folder, c, name):
    folder.mkdir(parents=True, exist_ok=True)
    for t, mm in enumerate(c["mm"]):
        np.save(folder / name.format(t), (mm / 1000).astype(np.float32))


def cut3r(src, c):
    """Its demo's: an archive of pose and intrinsics for every picture."""
    pictures(src / "color", c)
    metres(src / "depth", c, "{:06d}.npy")
    (src / "camera").mkdir()
    for t, m in enumerate(c2w_of(c)):
        np.savez(src / "camera" / f"{t:06d}.npz", pose=m, intrinsics=k3(c))


def monst3r(src, c):
    """Its demo's: everything in one folder, masks and confidence too; qw comes first."""
    pictures(src, c, "frame_{:04d}.png")
    metres(src, c, "frame_{:04d}.npy")
    metres(src, c, "conf_{}.npy")
    pictures(src, c, "dynamic_mask_{}.png")
    rows = np.concatenate([np.arange(T)[:, None], seven(c2w_of(c))], 1)
    np.savetxt(src / "pred_traj.txt", rows[:, [0, 1, 2, 3, 7, 4, 5, 6]])
    np.savetxt(src / "pred_intrinsics.txt", np.tile(k3(c).ravel(), (T, 1)))


def stray(src, c):
    """Stray Scanner's, of an iPhone; its odometry has gained columns, two of them empty."""
    write_video(src / "rgb.mp4", c["rgb"], 60, crf=4)
    counts(src / "depth", c)
    counts(src / "confidence", c)
    rows = ["timestamp, frame, x, y, z, qx, qy, qz, qw, fx, fy, cx, cy, distortion_center_x, y"]
    for t, row in enumerate(seven(c2w_of(c))):
        numbers = ", ".join(f"{x:.9g}" for x in (*row, *c["k"]))
        rows.append(f"{5218.25 + t / 60:.6f}, {t:06d}, {numbers}, , ")
    (src / "odometry.csv").write_text("\n".join(rows) + "\n")
    np.savetxt(src / "camera_matrix.csv", k3(c), delimiter=", ")


def opengl(c):
    return c2w_of(c) * np.array([1, -1, -1, 1])


def record3d(src, c):
    """Its export as EXR and JPG: ARKit's axes, quaternion first, K by columns."""
    pictures(src / "EXR_RGBD/rgb", c, "{}.png")
    (src / "EXR_RGBD/depth").mkdir()
    for t, mm in enumerate(c["mm"]):
        (src / "EXR_RGBD/depth" / f"{t}.exr").write_bytes(exr(mm / 1000))
    said = dict(h=H, w=W, fps=60, K=k3(c).T.ravel().tolist())
    said["poses"] = np.roll(seven(opengl(c)), 4, 1).tolist()
    (src / "EXR_RGBD/metadata.json").write_text(json.dumps(said))


def polycam(src, c):
    """Its raw data: a file of camera for every picture, named by time."""
    pictures(src / "keyframes/images", c, "3147820{:04d}.png")
    counts(src / "keyframes/depth", c, "3147820{:04d}.png")
    (src / "keyframes/cameras").mkdir()
    for t, m in enumerate(opengl(c)):
        said = {f"t_{row}{column}": m[row, column] for row in range(3) for column in range(4)}
        said |= dict(zip(("fx", "fy", "cx", "cy"), c["k"].tolist()), width=W, height=H)
        (src / "keyframes/cameras" / f"3147820{t:04d}.json").write_text(json.dumps(said))


def network_input(c):
    return (c["rgb"] / 255).astype(np.float32).transpose(0, 3, 1, 2)


def vggt(src, c):
    """predictions.npz of its demo, which also holds an object: None for a list of poses."""
    depth = (c["mm"] / 1000).astype(np.float32)[..., None]
    more = dict(extrinsic=c["w2c"], intrinsic=np.tile(k3(c), (T, 1, 1)), depth=depth)
    np.savez(src / "predictions.npz", pose_enc_list=None, images=network_input(c), **more)


def spatialtracker(src, c):
    more = dict(extrinsics=camera_files.homogeneous(c["w2c"]), video=network_input(c))
    more.update(intrinsics=np.tile(k3(c), (T, 1, 1)), coords=np.zeros((T, 7, 3)))
    np.savez(src / "walk_result.npz", depths=(c["mm"] / 1000).astype(np.float32), **more)


WRITERS = dict(
    sevenscenes=sevenscenes,
    scannet=scannet,
    tum=tum,
    tartanair=tartanair,
    vkitti2=vkitti2,
    wildrgbd=wildrgbd,
    omniworld=omniworld,
    replica=replica,
    kitti=kitti,
    redwood=redwood,
    nerfstudio=nerfstudio,
    blender=blender,
    colmap=colmap,
    vipe=vipe,
    da3=da3,
    megasam=megasam,
    vggt=vggt,
    spatialtracker=spatialtracker,
    cut3r=cut3r,
    monst3r=monst3r,
    stray=stray,
    record3d=record3d,
    polycam=polycam,
)
