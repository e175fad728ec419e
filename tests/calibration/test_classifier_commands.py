"""``calguide-fast reliability`` and ``calibrate`` on a checkpoint and labelled images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from calguide_fast.calibration import calibration_by_noise_level, measure_calibration, sources
from calguide_fast.calibration.images import open_images
from calguide_fast.calibration.inference import IMAGENET_MEAN, IMAGENET_STD
from calguide_fast.cli import main
from calguide_fast.models import EncoderUNet, LoadedClassifier, resnet18

CLASSES, SIZE = 3, 32
LABELS = np.arange(30) % CLASSES
PIXELS = np.random.default_rng(0).integers(0, 256, (30, SIZE, SIZE, 3), dtype=np.uint8)
IMAGES = torch.from_numpy(PIXELS).movedim(-1, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return resnet18(num_classes=CLASSES).eval()


@pytest.fixture
def folder(tmp_path, network):
    """A checkpoint, the images as OpenAI's .npz, and as folders of pictures."""
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    np.savez(tmp_path / "images.npz", PIXELS, LABELS)
    for index, (image, label) in enumerate(zip(PIXELS, LABELS)):
        file = tmp_path / "images" / "cba"[CLASSES - 1 - label] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    (tmp_path / "images" / "a" / "notes.txt").write_text("no picture")
    return tmp_path


def run(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    captured = capsys.readouterr()
    assert "classifying" in captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("preprocess", ["minus-one-one", "imagenet"])
@pytest.mark.parametrize("data", ["images.npz", "images"])
def test_reliability_of_a_checkpoint(data, preprocess, folder, network, capsys):
    x, labels = IMAGES, torch.from_numpy(LABELS)
    if data == "images":
        order = torch.sort(labels, stable=True).indices
        x, labels = x[order], labels[order]
    if preprocess == "imagenet":
        mean, std = (torch.tensor(value)[:, None, None] for value in (IMAGENET_MEAN, IMAGENET_STD))
        x = ((x + 1) / 2 - mean) / std
    with torch.no_grad():
        logits = network(x)
    arguments = ["--classifier", f"resnet18:{folder / 'weights.pt'}", "--data", folder / data, "--batch-size", 7]
    kept = folder / "new" / "logits.npz"
    found = run(capsys, "reliability", *arguments, "--preprocess", preprocess, "--save-logits", kept)
    expected = measure_calibration(logits, labels)
    assert found["smooth_ece"] == pytest.approx(expected.smooth_ece, abs=1e-5)
    assert found["accuracy"] == expected.accuracy and found["samples"] == 30
    # what was kept is a file of predictions
    with np.load(kept) as arrays:
        torch.testing.assert_close(torch.from_numpy(arrays["logits"]), logits, atol=1e-4, rtol=1e-4)
        assert np.array_equal(arrays["labels"], labels) and arrays.files == ["logits", "labels"]
    assert main(["reliability", str(kept)]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_calibrate_a_checkpoint(folder, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the demo extra")
    arguments = ["calibrate", "--classifier", f"resnet18:{folder / 'weights.pt'}", "--data", folder / "images.npz"]
    found = run(capsys, *arguments, "--test", folder / "images", "--out", folder / "a.png", "--softplus-beta", 3)
    assert found["method"] == "temperature" and (folder / "a.png").stat().st_size > 1000
    for part in ("before", "after"):
        assert found["tested_on"][part] == pytest.approx(found["fitted_on"][part], abs=1e-4)


def test_noise_levels_of_a_classifier_of_clean_images(folder, network, capsys):
    arguments = ["--classifier", f"resnet18:{folder / 'weights.pt'}", "--data", folder / "images.npz"]
    kept = folder / "logits.npz"
    found = run(
        capsys, "reliability", *arguments, "--noise-levels", 900, 100, "--batch-size", 11, "--save-logits", kept
    )
    expected = calibration_by_noise_level(network, None, IMAGES, torch.from_numpy(LABELS), timesteps=[100, 900])
    assert [level["timestep"] for level in found["noise_levels"]] == [100, 900]
    for name in ("sigma", "smooth_ece", "accuracy", "confidence", "cross_entropy"):
        column = getattr(expected, "sigmas" if name == "sigma" else name)
        assert [level[name] for level in found["noise_levels"]] == pytest.approx(column.tolist(), abs=1e-5)
    with np.load(kept) as arrays:
        assert arrays["timesteps"].tolist() == [100] * 30 + [900] * 30
        assert arrays["logits"].shape == (60, 3) and np.array_equal(arrays["labels"], np.tile(LABELS, 2))


class TestNoiseAware:
    @pytest.fixture
    def classifier(self, monkeypatch):
        options = dict(image_size=64, in_channels=3, model_channels=32, out_channels=CLASSES, num_res_blocks=1)
        options.update(attention_resolutions=(), channel_mult=(1,))
        torch.manual_seed(0)
        module = EncoderUNet(**options).eval()
        for value in module.parameters():
            value.data.add_(0.05 * torch.randn_like(value))
        monkeypatch.setattr(sources, "load_classifier", lambda *_: LoadedClassifier(module, "xt", "imagenet64"))
        return module

    def test_it_is_measured_along_the_diffusion(self, classifier, folder, capsys):
        pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the demo extra")
        data = open_images(folder / "images.npz", 64)
        (images, labels), *_ = data.batches(2)
        assert images.shape == (2, 64, 64, 3)
        np.savez(folder / "few.npz", images, labels)
        arguments = ["--classifier", "imagenet64:a.pt", "--data", folder / "few.npz"]
        found = run(capsys, "reliability", *arguments, "--out", folder / "a.png", "--bandwidth", 0.1)
        levels = found["noise_levels"]
        assert len(levels) == 10 and (levels[0]["timestep"], levels[-1]["timestep"]) == (0, 999)
        x = torch.from_numpy(images).movedim(-1, 1) / 127.5 - 1
        expected = calibration_by_noise_level(
            classifier, None, x, torch.from_numpy(labels), "cosine", timesteps=10, input="xt"
        )
        assert [level["confidence"] for level in levels] == pytest.approx(expected.confidence.tolist(), abs=1e-5)
        assert (folder / "a.png").stat().st_size > 1000
        found = run(capsys, "calibrate", *arguments, "--noise-levels", 10, 500)
        assert found["fitted_on"]["before"]["samples"] == 4

    def test_it_knows_images_in_minus_one_to_one(self, classifier, folder):
        with pytest.raises(SystemExit, match="'imagenet' is not for a noise-aware classifier"):
            main(
                ["reliability", "--classifier", "imagenet64:a.pt", "--data", str(folder / "images")]
                + ["--preprocess", "imagenet"]
            )


def test_resize_cuts_the_middle_square(tmp_path):
    image = np.zeros((20, 40, 3), np.uint8)
    # but for what a bicubic filter takes from further out
    image[:, 10 - 4 : 30 + 4] = 200
    (tmp_path / "data" / "a").mkdir(parents=True)
    Image.fromarray(image).save(tmp_path / "data" / "a" / "wide.png")
    Image.fromarray(np.full((30, 10), 7, np.uint8)).save(tmp_path / "data" / "a" / "high_gray.PNG")
    ((images, labels),) = open_images(tmp_path / "data", 10).batches(5)
    assert images.shape == (2, 10, 10, 3) and labels.tolist() == [0, 0]
    assert (images[0] == 7).all() and (images[1] == 200).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a FILE of predictions, or --classifier NAME:PATH with --data DATA"),
        (["--data", "images"], "--data goes with --classifier NAME:PATH, which is not given"),
        (["a.csv", "--noise-levels", "3"], "--noise-levels goes with --classifier"),
        (["a.csv", "--preprocess", "minus-one-one"], "--preprocess goes with --classifier NAME:PATH, which is not giv"),
        (["a.csv", "--batch-size", "64"], "--batch-size goes with --classifier NAME:PATH, which is not given"),
        (["--classifier", "resnet18:{0}/weights.pt"], "--classifier goes with --data DATA, and with no FILE"),
        (["--classifier", "resnet20:a", "--data", "x"], "must be NAME:PATH, with NAME one of resnet18"),
        (["--classifier", "resnet18:{0}/none.pt", "--data", "x"], "no checkpoint at .*none.pt"),
        (["{checkpoint}", "--data", "{0}/none"], "no images at .*none: expected an .npz file with uint8"),
        (["{checkpoint}", "--data", "{0}/weights.pt"], "weights.pt holds no images that can be read here"),
        (["{checkpoint}", "--data", "{0}/images", "--noise-levels", "1000"], r"timesteps=\[1000\] must lie in 0..999"),
        (["{checkpoint}", "--data", "{0}/images", "--batch-size", "0"], "batch_size=0 must be positive"),
        (["{checkpoint}", "--data", "{0}/images", "--resize", "0"], "resize=0 must be a positive number"),
        (["{checkpoint}", "--data", "{0}/images", "--device", "abacus"], "device='abacus' is no device of PyTorch's"),
        (["{checkpoint}", "--data", "{0}/images", "--save-logits", "a.pt"], "a.pt must be an .npz file"),
    ],
)
def test_options_that_cannot_be_are_one_line(arguments, message, folder):
    checkpoint = ["--classifier", f"resnet18:{folder}/weights.pt"]
    arguments = [a.format(folder) for a in arguments if a != "{checkpoint}"] + checkpoint * (
        "{checkpoint}" in arguments
    )
    with pytest.raises(SystemExit, match=message) as stop:
        main(["reliability", *arguments])
    assert str(stop.value).startswith("calguide-fast: ") and "\n" not in str(stop.value)


def spoil(folder, how):
    data = folder / "images.npz"
    if how in ("nothing", "cut"):
        data.write_bytes(data.read_bytes()[: 20_000 if how == "cut" else 0])
    elif how.startswith("damaged"):
        if "compressed" in how:
            np.savez_compressed(data, PIXELS, LABELS)
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif how == "another file":
        with data.open("wb") as file:
            np.save(file, PIXELS)
    elif how == "one array":
        np.savez(data, PIXELS)
    elif how == "floats":
        np.savez(data, PIXELS / 255, LABELS)
    elif how == "labels":
        np.savez(data, PIXELS, LABELS[:-1])
    elif how == "range":
        np.savez(data, PIXELS, LABELS + 1)
    elif how == "gray":
        np.savez(data, PIXELS[..., :1], LABELS)
    elif how == "empty":
        (folder / "none" / "a").mkdir(parents=True)
        return folder / "none"
    elif how == "size":
        Image.fromarray(PIXELS[0, :16]).save(folder / "images" / "a" / "zz.png")
        return folder / "images"
    elif how == "broken":
        (folder / "images" / "b" / "zz.png").write_bytes(b"no picture")
        return folder / "images"
    else:
        (folder / "images" / "d").mkdir()
        return folder / "images"
    return data


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("nothing", "no labelled images: .*images.npz is no readable .npz file: .*; expected an .npz file with uint8"),
        ("cut", "no labelled images: .*images.npz is no readable .npz file"),
        ("damaged", "images.npz is no readable .npz file: Bad CRC"),
        ("damaged and compressed", "images.npz is no readable .npz file"),
        ("another file", "no labelled images: .*images.npz is no readable .npz file"),
        ("one array", "no labelled images: .*images.npz holds arr_0, but no arr_1; expected"),
        ("floats", r"arr_0 has shape \(30, 32, 32, 3\) and dtype float64; it must be \(n, H, W, C\), uint8"),
        ("labels", r"arr_1 has shape \(29,\) and dtype int64; it must be \(30,\), integers"),
        ("range", r"labels\[2\]=3 is out of range"),
        ("gray", r"x must have shape \(B, 3, H, W\), got \(30, 1, 32, 32\)"),
        ("empty", "holds 1 folders and no pictures in them"),
        ("size", "zz.png is of another size than the pictures before it, 32x32 and 32x16: resize them"),
        ("broken", "zz.png is no readable picture"),
        ("folders", "the data have 4 class folders and the classifier 3 classes"),
    ],
)
def test_unusable_images_are_one_line(how, message, folder):
    data = spoil(folder, how)
    with pytest.raises(SystemExit, match=message) as stop:
        main(["reliability", "--classifier", f"resnet18:{folder}/weights.pt", "--data", str(data)])
    assert str(stop.value).startswith("calguide-fast: ") and "\n" not in str(stop.value)
