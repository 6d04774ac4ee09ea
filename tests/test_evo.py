"""Trajectory errors beside evo's (github.com/MichaelGrupp/evo), where it is installed.

With EVO_DATA = a folder of evo's test/data, on its public KITTI trajectories too."""

import os
import pathlib

import numpy as np
import pytest
import torch

from geometry import inv_se3
from lib.camera_paths import exp_se3
from lib.metrics import pose_metrics

pytest.importorskip("evo")
from evo.core import metrics as peer  # noqa: E402
from evo.core.trajectory import PosePath3D  # noqa: E402

DATA = pathlib.Path(os.environ.get("EVO_DATA", "absent"))


def invented(seed):
    """A wandering path (60, 3, 4) and an estimate that drifts, in another world and scale."""
    torch.manual_seed(seed)
    steps = exp_se3(0.1 * torch.randn(60, 6).double())
    noise = exp_se3(0.01 * torch.randn(60, 6).double())
    paths = []
    for parts in ([steps], [steps, noise]):
        pose, path = torch.eye(4).double(), []
        for motions in zip(*parts):
            for motion in motions:
                pose = pose @ torch.cat([motion, torch.tensor([[0, 0, 0, 1.0]]).double()])
            path.append(pose)
        paths.append(torch.stack(path))
    paths[1][:, :3, 3] *= 0.4
    other = torch.eye(4).double()
    other[:3] = exp_se3(torch.randn(6).double()[None])[0]
    return paths[0], other @ paths[1]


def kitti(estimate):
    files = [DATA / f"KITTI_00_{name}.txt" for name in ("gt", estimate)]
    if not all(file.is_file() for file in files):
        pytest.skip("EVO_DATA does not hold evo's test/data")
    poses = [torch.from_numpy(np.loadtxt(f)).view(-1, 3, 4)[::20] for f in files]
    last = torch.tensor([[0, 0, 0, 1.0]]).double()
    return [torch.cat([p, last.expand(len(p), 1, 4)], 1) for p in poses]


@pytest.mark.parametrize("source", [0, 1, "ORB", "SPTAM"])
def test_trajectory_errors_are_evos(source):
    truth, estimate = invented(source) if isinstance(source, int) else kitti(source)
    ours = pose_metrics(*(inv_se3(x[None, :, :3]) for x in (estimate, truth)))
    theirs = [PosePath3D(poses_se3=list(x.numpy())) for x in (truth, estimate)]
    theirs[1].align(theirs[0], correct_scale=True)
    found = {}
    ape = peer.APE(peer.PoseRelation.translation_part)
    ape.process_data(tuple(theirs))
    found["ate"] = ape.get_statistic(peer.StatisticsType.rmse)
    for name, relation, kind in (
        ("rpe_trans", peer.PoseRelation.translation_part, peer.StatisticsType.rmse),
        ("rpe_rot", peer.PoseRelation.rotation_angle_deg, peer.StatisticsType.mean),
    ):
        rpe = peer.RPE(relation, delta=1, delta_unit=peer.Unit.frames)
        rpe.process_data(tuple(theirs))
        found[name] = rpe.get_statistic(kind)
    exact = 1e-6 if isinstance(source, int) else 1e-5  # the files have seven digits
    for name, value in found.items():
        assert ours[name] == pytest.approx(value, rel=exact, abs=1e-9), name
