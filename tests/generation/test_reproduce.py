"""``calguide-fast reproduce``: its forecast against independent counts, its table, and what it asks for."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from calguide_fast import models
from calguide_fast.cli import main
from calguide_fast.demo.checkpoints import load_guide, load_unet
from calguide_fast.evaluation import ImageFeatures
from calguide_fast.generation import networks
from calguide_fast.models.blocks import AttentionBlock
from calguide_fast.models.specs import RESNETS, LoadedClassifier
from calguide_fast.studies import measure
from calguide_fast.studies.cost import classifier_cost, flops, unet_cost
from calguide_fast.studies.published import URLS
from calguide_fast.studies.rows import ROWS

DRY = ["reproduce", "imagenet128", "--weights", "w", "--reference", "r.npz", "--dry-run"]


def multiply_adds(unet: nn.Module, *inputs: torch.Tensor) -> int:
    """By shapes alone: every output of a convolution or matrix product costs one row of its weights."""
    total = 0

    def weighed(module, _, output):
        nonlocal total
        total += output.numel() * module.weight[0].numel()

    def attention(module, inputs, _):
        nonlocal total
        _, channels, height, width = inputs[0].shape
        tokens = height * width
        # q, k, v and the projection; then scores and their mean of the values
        total += 4 * tokens * channels**2 + 2 * tokens**2 * channels

    for module in unet.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(attention)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(weighed)
    unet(*inputs)
    return total


def test_the_unets_cost_is_counted():
    found = unet_cost("imagenet128")
    with torch.device("meta"):
        zero = torch.zeros(1, dtype=torch.long)
        unet = models.adm_unet("imagenet128").requires_grad_(False)
        expected = multiply_adds(unet, torch.zeros(1, 3, 128, 128), zero, zero)
    assert found.flops == 2 * expected
    assert found.parameters == 421_529_606


def test_costs_that_are_published():
    # Peebles & Xie, 2023 (arXiv 2212.09748), of ADM at 256 pixels, in multiply-adds
    assert unet_cost("imagenet256").flops / 2e9 == pytest.approx(1120, rel=2e-3)
    # torchvision's pages of ResNets, at 224 pixels
    with torch.device("meta"), torch.no_grad():
        for name, published in (("resnet50", 4.09), ("resnet101", 7.80)):
            resnet = RESNETS[name](num_classes=1000).eval()
            found = flops(lambda resnet=resnet: resnet(torch.zeros(1, 3, 224, 224)))
            assert found / 2e9 == pytest.approx(published, abs=0.006)
    assert classifier_cost("resnet50", "imagenet128").parameters == 25_557_032


def test_a_gradient_costs_as_much_as_the_logits():
    with torch.device("meta"), torch.no_grad():
        resnet = RESNETS["resnet101"](num_classes=1000).eval()
        logits = flops(lambda: resnet(torch.zeros(1, 3, 128, 128)))
    assert classifier_cost("resnet101", "imagenet128").flops == 2 * logits


def cells(text: str, row: str) -> list[str]:
    (line,) = re.findall(rf"^\| {row} +\|(.*)\|$", text, flags=re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_dry_run(capsys, tmp_path):
    out = ["--out", str(tmp_path / "none")]
    options = ["--rows", "unguided,js", "--num-samples", "1000", "--steps", "25", "--gpus", "4", "--tflops", "100"]
    assert main([*DRY, *options, *out]) == 0
    text = capsys.readouterr().out
    per_image = {
        "unguided": 25 * unet_cost("imagenet128").flops,
        "js": 25 * (unet_cost("imagenet128").flops + classifier_cost("resnet101", "imagenet128").flops),
    }
    for name, cost in per_image.items():
        images, steps, *_, tflop, eflop, gigabytes, hours = cells(text, name)
        assert (images, steps) == ("1,000", "25")
        assert float(tflop) == pytest.approx(cost / 1e12, abs=0.051)
        assert float(eflop) == pytest.approx(cost * 1e3 / 1e18, abs=5.1e-4)
        # 128·128·3 bytes and two numbers of 8 in the .npz, and the bytes again in shards
        assert float(gigabytes) == pytest.approx(1000 * (2 * 49152 + 16) / 1e9, abs=0.0051)
        assert float(hours) == pytest.approx(cost * 1e3 / 1e14 / 3600, abs=0.051)
    hours = 1e3 * sum(per_image.values()) / 1e14 / 3600
    assert f"as given: {hours:.1f} GPU hours, {hours / 4:.1f} hours on 4" in text
    assert "an estimate, not a measurement" in text and not (tmp_path / "none").exists()
    # what is missing, and nothing that these rows do not need
    missing = text.partition("Missing files:")[2]
    assert re.findall(r"/(\S+?): published", missing) == [
        "128x128_diffusion.pt",
        *map(name_of, ("resnet101", "inception")),
    ]
    assert URLS["resnet101"] in missing and "VIRTUAL_imagenet128_labeled.npz" in missing


def name_of(file: str) -> str:
    return URLS[file].rpartition("/")[2]


def test_rates(capsys):
    base = [*DRY, "--rows", "js", "--num-samples", "3600"]
    cost = 250 * (unet_cost("imagenet128").flops + classifier_cost("resnet101", "imagenet128").flops)
    for options, expected in (
        (["--images-per-second", "2"], 0.5),
        (["--gpu", "A100", "--dtype", "bf16", "--utilisation", "0.5"], cost * 3600 / 156e12 / 3600),
        (["--gpu", "H100", "--dtype", "fp16"], cost * 3600 / (0.3 * 989e12) / 3600),
    ):
        assert main([*base, *options]) == 0
        text = capsys.readouterr().out
        assert float(re.search(r": (\S+) GPU hours", text)[1]) == pytest.approx(expected, abs=0.051)
        assert ("assumed" in text) == ("fp16" in options)
    # without a rate, by assumption on every GPU that is known
    assert main([*base, "--dtype", "bf16"]) == 0
    text = capsys.readouterr().out
    assert float(cells(text, "A100")[0]) == pytest.approx(cost / (0.3 * 312e12), abs=0.051)
    assert "an assumption" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "js,adm"], r"rows='js,adm' must be different ones of unguided, adm-g"),
        (["--gpu", "TPU"], "gpu='TPU' must be one of A100"),
        (["--utilisation", "0.5"], "name one"),
        (["--gpu", "A100", "--utilisation", "30"], "utilisation=30.0 must be above 0"),
        (["--tflops", "0"], "tflops must be positive"),
        (["--gpus", "0"], "gpus must be at least 1"),
        (["--epsilon", "2"], "epsilon"),
    ],
    ids=lambda value: "".join(value) if isinstance(value, list) else "",
)
def test_what_is_refused(options, message):
    with pytest.raises(SystemExit, match=message):
        main([*DRY, *options])


def test_missing_files_are_all_named(tmp_path):
    with pytest.raises(SystemExit, match="nothing is downloaded") as stop:
        main([*DRY[:-1], "--out", str(tmp_path / "out")])
    assert all(f"published at {url}" in str(stop.value) for url in URLS.values())
    assert not (tmp_path / "out").exists()


class FakeInception:
    """Features at a glance, in Inception's place."""

    name = "fake"

    def __init__(self, path, protocol, device):
        self.protocol = protocol

    def __call__(self, images):
        table = nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)
        return ImageFeatures(table, table.square(), 20 * table)


def test_the_table(tmp_path, monkeypatch):
    """With the digits' networks in the place of the published ones, whose weights are not at hand."""

    def load_classifier(spec, softplus_beta):
        return LoadedClassifier(load_guide(softplus_beta=softplus_beta), "x0", None)

    monkeypatch.setattr(networks, "load_unet", lambda preset, path: load_unet())
    monkeypatch.setattr(networks, "load_classifier", load_classifier)
    monkeypatch.setattr(measure, "Inception", FakeInception)
    for name in URLS:
        (tmp_path / name_of(name)).write_bytes(name.encode())
    reference = tmp_path / "VIRTUAL_imagenet128_labeled.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
    np.savez(reference, arr_0=pixels, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(4), sigma_s=np.eye(4))
    command = [*DRY[:-1], "--weights", str(tmp_path), "--reference", str(reference), "--out", str(tmp_path / "out")]
    command += ["--labels", "0-9", "--num-samples", "6", "--steps", "2", "--alpha", "2", "--scale", "0.5"]
    assert main([*command, "--rows", "js"]) == 0
    assert main(command) == 0

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["row"] for row in results["rows"]] == list(ROWS)
    settings = [
        json.loads((tmp_path / "out" / row["folder"] / "config.json").read_text())["settings"]
        for row in results["rows"]
    ]
    found = [(entry["classifier"], entry["softplus_beta"]) for entry in settings]
    for index, entry in enumerate(settings):
        if entry["guidance"] is not None:
            found[index] += tuple(entry["guidance"][name] for name in ("divergence", "scale", "marginal_temperature"))
    assert found == [
        (None, None),
        ("imagenet128", None, "none", 0.5, 1.0),
        ("resnet50", 3.0, "none", 1.0, 0.5),
        ("resnet101", 3.0, "none", 1.0, 0.5),
        ("resnet101", 3.0, "forward_kl", 0.5, 0.5),
        ("resnet101", 3.0, "reverse_kl", 0.5, 0.5),
        ("resnet101", 3.0, "js", 0.5, 0.5),
    ]
    assert [row.get("alpha") for row in results["rows"]] == [None] * 4 + [2.0] * 3
    assert [row["published"]["fid"] for row in results["rows"]] == [5.91, 2.97, 2.36, 2.19, 2.17, 2.14, 2.13]
    # one run of each, js too
    assert all(len(json.loads(p.read_text())["runs"]) == 1 for p in tmp_path.glob("out/points/*/config.json"))

    table = (tmp_path / "out" / "table.md").read_text()
    js = cells(table, "Jensen–Shannon, ResNet-101")
    measured = results["rows"][-1]
    assert js[:3] == ["2.13", f"{measured['fid']:.2f}", f"{measured['fid'] - 2.13:+.2f}"]
    assert js[-3:] == ["2", "0.9", "0.5"] and cells(table, "ADM, unguided")[-1] == ""
    assert "these do not compare with them" in table and "the paper's are not known" in table

    # statistics alone: neighbours have nothing to be sought among
    np.savez(reference, mu=np.zeros(4), sigma=np.eye(4), mu_s=np.zeros(4), sigma_s=np.eye(4))
    assert main([*command, "--rows", "js"]) == 0
    again = cells((tmp_path / "out" / "table.md").read_text(), "Jensen–Shannon, ResNet-101")
    assert again[1] == js[1] and (js[4] != "") and again[4] == again[6] == ""


def test_a_bad_reference_is_found_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "Inception", FakeInception)
    for file in [*map(name_of, URLS), "r.npz"]:
        (tmp_path / file).write_bytes(b"none")
    command = [*DRY[:-1], "--weights", str(tmp_path), "--reference", str(tmp_path / "r.npz"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="r.npz is no readable .npz file"):
        main(command)
    assert not (tmp_path / "points").exists()
