"""The real network's path, with random weights: torch-fidelity's own forward pass is the reference."""

from __future__ import annotations

import hashlib
import json
import pickle
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fidelity import import_torch_fidelity, write_random_inception

from calguide_fast.cli import main
from calguide_fast.evaluation import Inception, evaluate

IMAGES = torch.randint(0, 256, (4, 3, 20, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_random_inception(tmp_path_factory.mktemp("inception") / "random.pth")


def tensorflow_1_bilinear(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) to (size, size): source places i·H/size, no half pixels, the last row and column repeated."""

    def places(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        at = np.arange(size) * (length / size)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, length - 1), at - low

    (top, bottom, dy), (left, right, dx) = places(image.shape[0]), places(image.shape[1])
    rows = image[top] * (1 - dy[:, None]) + image[bottom] * dy[:, None]
    return rows[:, left] * (1 - dx) + rows[:, right] * dx


@pytest.mark.full
@torch.no_grad()
def test_features_are_those_of_torch_fidelity(weights):
    import_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    ours = Inception(weights)
    pool3, logits = theirs(IMAGES)
    found = ours(IMAGES)
    assert torch.equal(found.features, pool3) and torch.equal(found.logits, logits)
    assert pool3.shape == (4, 2048) and logits.shape == (4, 1008) and pool3.std() > 0.1
    assert ours.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert ours.name.startswith("Inception-v3 of torch-fidelity")


@pytest.mark.full
@torch.no_grad()
def test_spatial_features_are_seven_channels_place_by_place(weights):
    ours = Inception(weights)
    net = ours._net
    x = torch.from_numpy(np.stack([[tensorflow_1_bilinear(c, 299) for c in image] for image in IMAGES[:2].numpy()]))
    x = (x.float() - 128) / 128
    torch.testing.assert_close(ours._resized(IMAGES[:2].float()), x, rtol=0, atol=2e-5)
    for name in ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"):
        x = getattr(net, name)(x)
    for name in ("MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"):
        x = getattr(net, name)(x)
    # mixed_4 is 6b, mixed_5 is 6c, mixed_6 is 6d; its first convolution, in TensorFlow's order (row, column, channel)
    expected = F.relu(net.Mixed_6d.branch1x1.bn(net.Mixed_6d.branch1x1.conv(x))).numpy()
    found = ours(IMAGES[:2]).spatial.reshape(2, 17, 17, 7).numpy()
    scale = np.abs(expected).max()
    for channel in range(7):
        np.testing.assert_allclose(found[..., channel], expected[:, channel], rtol=0, atol=1e-4 * scale)


@pytest.mark.full
@torch.no_grad()
def test_protocols_see_images_differently(weights):
    adm, pytorch_fid = Inception(weights), Inception(weights, protocol="pytorch-fid")
    expected = F.interpolate(IMAGES.double() / 255, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(pytorch_fid._resized(IMAGES.float()).double(), expected, rtol=0, atol=1e-5)
    a, b = adm(IMAGES[:1]), pytorch_fid(IMAGES[:1])
    assert 0.01 < (a.features - b.features).norm() / a.features.norm() < 1
    grey = IMAGES[:1, :1]
    assert torch.equal(adm(grey).features, adm(grey.repeat(1, 3, 1, 1)).features)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*their covariance is singular")
def test_the_command_with_inception(weights, tmp_path, capsys):
    random = np.random.RandomState(0)
    for name in ("samples", "reference"):
        np.savez(tmp_path / f"{name}.npz", random.randint(0, 256, (6, 8, 8, 3), dtype=np.uint8))
    command = ["evaluate", str(tmp_path / "samples.npz"), str(tmp_path / "reference.npz"), "--inception", str(weights)]
    with pytest.warns(UserWarning, match="not Inception's published weights"):
        assert main([*command, "--protocol", "pytorch-fid", "--batch-size", "4", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["metrics"]) == {"fid", "sfid", "is", "precision", "recall", "density", "coverage"}
    assert found["metrics"]["fid"] > 0 and found["metrics"]["sfid"] > 0 and 1 <= found["metrics"]["is"] < 6
    assert found["protocol"] == "pytorch-fid" and found["weights_from"] == str(weights)
    assert found["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert any("for 2048 features" in doubt for doubt in found["warnings"])
    assert any("for 2023 features" in doubt for doubt in found["warnings"])


def test_a_missing_file_says_where_it_is_published(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no Inception weights at .*nothing.pth; .*torch-fidelity/releases"):
        Inception(tmp_path / "nothing.pth")
    with pytest.raises(ValueError, match="protocol='clean' must be one of 'adm', 'pytorch-fid'"):
        Inception(tmp_path / "nothing.pth", protocol="clean")
    with pytest.raises(ValueError, match="a network is needed: .*torch-fidelity/releases"):
        evaluate(IMAGES.movedim(1, -1), IMAGES.movedim(1, -1), metrics=["fid"])


class RunsCode:
    def __reduce__(self):
        return (print, ("the file's code was run",))


def test_a_file_that_brings_code_or_other_weights_is_refused(tmp_path, capsys):
    import_torch_fidelity()
    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(RunsCode(), protocol=2))
    with pytest.raises(ValueError, match="was refused"):
        Inception(path)
    assert capsys.readouterr().out == ""
    torch.save({"fc.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="other weights than Inception's, published at"):
        Inception(path)


def test_torch_fidelity_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(ImportError, match=r"pip install '.\[evaluate\]'"):
        Inception(tmp_path / "weights.pth")
