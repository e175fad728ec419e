"""``evaluate`` and ``calguide-fast evaluate``, end to end with small networks."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import small_extractors
import torch
from PIL import Image

from calguide_fast.cli import main
from calguide_fast.evaluation import (
    density_coverage,
    evaluate,
    feature_statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)
from calguide_fast.evaluation.extractors import extractor_name, import_extractor, source_sha256
from calguide_fast.evaluation.inception import PUBLISHED_HASH, Inception
from calguide_fast.samples import Samples

SAMPLES = np.random.RandomState(0).randint(0, 200, (70, 6, 5, 3), dtype=np.uint8)
REFERENCE = np.random.RandomState(1).randint(20, 256, (50, 6, 5, 3), dtype=np.uint8)
SEEN, REAL = (small_extractors.complete(torch.from_numpy(pixels).movedim(-1, 1)) for pixels in (SAMPLES, REFERENCE))
EXPECTED = {
    "fid": frechet_distance(SEEN.features, REAL.features),
    "sfid": frechet_distance(SEEN.spatial, REAL.spatial),
    "is": inception_score(SEEN.logits),
    **precision_recall(REAL.features, SEEN.features)._asdict(),
    **density_coverage(REAL.features, SEEN.features)._asdict(),
}
HERE = Path(__file__).parent


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "samples.npz", SAMPLES, np.zeros(70, dtype=np.int64))
    np.savez(tmp_path / "reference.npz", REFERENCE)
    return tmp_path / "samples.npz", tmp_path / "reference.npz"


def statistics(seen) -> dict[str, np.ndarray]:
    (mu, sigma), (mu_s, sigma_s) = feature_statistics(seen.features), feature_statistics(seen.spatial)
    return {name: table.numpy() for name, table in (("mu", mu), ("sigma", sigma), ("mu_s", mu_s), ("sigma_s", sigma_s))}


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
def test_every_figure_is_that_of_its_own_function(files, batch_size):
    found = evaluate(*files, features=small_extractors.complete, batch_size=batch_size, device="cpu", progress=False)
    assert found.metrics == pytest.approx(EXPECTED, rel=1e-9)
    assert list(found.metrics) == list(EXPECTED) and found.left_out == {} and found.warnings == []
    assert (found.samples, found.reference_images) == (70, 50)
    assert found.extractor == "small_extractors:complete"
    assert found.protocol is None and found.weights_sha256 is None and found.split == 5000
    assert found.source_sha256 == hashlib.sha256(Path(small_extractors.__file__).read_bytes()).hexdigest()
    assert found.neighbours == {"precision": 3, "recall": 3, "density": 5, "coverage": 5}
    assert found.statistics_from == {"fid": "images", "sfid": "images"}


def test_arrays_and_folders_are_what_files_are(files, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, pixels in enumerate(SAMPLES):
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    settings = {"features": "small_extractors:complete", "device": "cpu", "progress": False}
    for samples, reference in ((SAMPLES, torch.from_numpy(REFERENCE)), (folder, files[1]), (str(folder), REFERENCE)):
        assert evaluate(samples, reference, **settings).metrics == pytest.approx(EXPECTED, rel=1e-9)


def test_statistics_in_a_file_come_before_its_images(tmp_path):
    # as in OpenAI's files: statistics of more images than are there
    many = small_extractors.complete(torch.randint(0, 256, (400, 3, 6, 5), dtype=torch.uint8))
    np.savez(tmp_path / "both.npz", REFERENCE, **statistics(many))
    found = evaluate(SAMPLES, tmp_path / "both.npz", features=small_extractors.complete, device="cpu", progress=False)
    expected = {
        "fid": frechet_distance(SEEN.features, many.features),
        "sfid": frechet_distance(SEEN.spatial, many.spatial),
    }
    assert found.metrics == pytest.approx(EXPECTED | expected, rel=1e-9)
    assert found.statistics_from == {"fid": "file", "sfid": "file"} and found.reference_images == 50


class Seen(Inception):
    """Under Inception's name, without its network."""

    def __init__(self, protocol: str) -> None:
        self.protocol, self.sha256, self.name = protocol, PUBLISHED_HASH, "seen"

    def __call__(self, images):
        return small_extractors.complete(images)


@pytest.mark.filterwarnings("ignore:s?fid. samples as pytorch-fid")
def test_statistics_of_another_protocol_are_doubted(tmp_path):
    # as ADM's evaluator writes them, and as pytorch-fid does
    np.savez(tmp_path / "adm.npz", REFERENCE, **statistics(REAL))
    np.savez(tmp_path / "fid.npz", **{name: table for name, table in statistics(REAL).items() if "_s" not in name})
    for protocol, reference, doubted in (
        ("pytorch-fid", tmp_path / "adm.npz", ["fid", "sfid"]),
        ("pytorch-fid", tmp_path / "fid.npz", []),
        ("pytorch-fid", REFERENCE, []),
        ("adm", tmp_path / "adm.npz", []),
    ):
        found = evaluate(SAMPLES, reference, features=Seen(protocol), device="cpu", progress=False)
        assert [doubt.partition(":")[0] for doubt in found.warnings] == doubted
        assert all("samples as pytorch-fid sees them" in doubt for doubt in found.warnings)


def test_statistics_alone_leave_neighbours_out(tmp_path):
    # pytorch-fid's files hold mu and sigma alone
    np.savez(tmp_path / "fid.npz", **{name: table for name, table in statistics(REAL).items() if "_s" not in name})
    found = evaluate(SAMPLES, tmp_path / "fid.npz", features=small_extractors.complete, device="cpu", progress=False)
    assert found.metrics == pytest.approx({name: EXPECTED[name] for name in ("fid", "is")}, rel=1e-9)
    assert found.left_out.keys() == {"sfid", "precision", "recall", "density", "coverage"}
    assert found.left_out["recall"] == "the reference holds no images (arr_0)"
    assert found.reference_images is None
    with pytest.raises(ValueError, match="nothing can be measured: recall: the reference holds no images"):
        evaluate(SAMPLES, tmp_path / "fid.npz", features=small_extractors.complete, metrics=["recall"], progress=False)


def test_the_network_sees_what_the_metrics_need_and_no_more(files, tmp_path):
    seen = []

    def counting(images):
        seen.append(len(images))
        return small_extractors.pooled(images)

    np.savez(tmp_path / "both.npz", REFERENCE, **statistics(REAL))
    evaluate(files[0], tmp_path / "both.npz", features=counting, metrics=["fid"], device="cpu", progress=False)
    assert sum(seen) == 70
    seen.clear()
    found = evaluate(files[0], files[1], features=counting, device="cpu", progress=False)
    assert sum(seen) == 120
    assert found.left_out == {
        "sfid": "the extractor gives no spatial features",
        "is": "the extractor gives no logits",
    }


def test_few_images_are_doubted_or_refused():
    settings = {"features": small_extractors.complete, "device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match=r"fid: 12 images \(samples\) for 12 features: their covariance is singular"):
        found = evaluate(SAMPLES[:12], REFERENCE, metrics=["fid", "sfid"], **settings)
    assert len(found.warnings) == 1
    assert found.metrics["fid"] == pytest.approx(frechet_distance(SEEN.features[:12], REAL.features), rel=1e-9)
    with pytest.raises(ValueError, match="samples: 1 images, but fid needs at least 2"):
        evaluate(SAMPLES[:1], REFERENCE, metrics=["fid"], **settings)
    with pytest.raises(ValueError, match="samples: 3 images, but precision needs at least 4"):
        evaluate(SAMPLES[:3], REFERENCE, metrics=["precision"], **settings)
    with pytest.raises(ValueError, match="reference: 5 images, but coverage needs at least 6"):
        evaluate(SAMPLES, REFERENCE[:5], metrics=["coverage"], **settings)
    evaluate(SAMPLES[:1], REFERENCE, metrics=["is", "density"], **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"metrics": ["fid", "kid"]}, ValueError, "metrics='fid,kid' must be some of fid, sfid, is"),
        ({"metrics": []}, ValueError, "metrics='' must be some of"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"device": "abacus"}, ValueError, "device='abacus' is no device"),
        ({"inception": "a.pth"}, ValueError, "give either inception='a.pth' or features="),
        ({"protocol": "adm"}, ValueError, "protocol='adm' is how Inception sees images"),
        ({"features": "small_extractors"}, ValueError, "must be of the form module:function"),
        ({"features": ".small_extractors:pooled"}, ValueError, "must be of the form module:function"),
        ({"features": "small_extractors:nothing"}, ValueError, "small_extractors has no function 'nothing'"),
        ({"features": "small_extractors:not_callable"}, ValueError, "has no function 'not_callable'"),
        ({"features": "no_such_module:f"}, ImportError, "no_such_module"),
        ({"features": small_extractors.text}, TypeError, "features returned str"),
        ({"features": small_extractors.one_row}, ValueError, r"shape \(1, 3\) for 64 images"),
    ],
)
def test_unusable_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        evaluate(SAMPLES, REFERENCE, **({"features": small_extractors.pooled, "progress": False} | settings))


def test_unusable_references_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", other=REFERENCE)
    with pytest.raises(ValueError, match=r"a.npz holds other; a reference must hold images \(arr_0\) or statistics"):
        evaluate(SAMPLES, tmp_path / "a.npz", features=small_extractors.pooled)
    np.savez(tmp_path / "b.npz", mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match="fid: a sample has 12 features and the reference has 7"):
        evaluate(SAMPLES, tmp_path / "b.npz", features=small_extractors.pooled, progress=False)


def test_what_the_sampler_saves_is_what_is_measured(tmp_path):
    images = torch.rand(20, 1, 8, 8) * 2 - 1
    samples = Samples(images, torch.zeros(20, dtype=torch.int64), torch.arange(20), batch_size=20)
    settings = {"features": small_extractors.pooled, "metrics": ["fid", "recall"], "device": "cpu", "progress": False}
    found = evaluate(samples.save_npz(tmp_path), REFERENCE[..., :1], **settings)
    assert found.samples == 20
    assert found.metrics == evaluate(samples.to_uint8(), REFERENCE[..., :1], **settings).metrics


@pytest.mark.gpu
def test_on_a_gpu(files):
    found = evaluate(*files, features=small_extractors.complete, device="cuda", progress=False)
    assert found.metrics == pytest.approx(EXPECTED, rel=1e-4)


def test_changed_code_is_another_extractor(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file, found = tmp_path / "my_own_features.py", []
    for code in ("def f(images): return images", "def f(images): return -images", "class f:\n def __call__(_, x): 0"):
        file.write_text(code)
        monkeypatch.delitem(sys.modules, "my_own_features", raising=False)
        extractor = import_extractor("my_own_features:f")
        found.append(source_sha256(extractor() if isinstance(extractor, type) else extractor))
        assert found[-1] == hashlib.sha256(code.encode()).hexdigest()
    assert len(set(found)) == 3
    typed_in: dict = {}
    exec("def f(images): return images", typed_in)
    # nothing is known of what has no file, and what has a name of its own says itself what it is
    assert source_sha256(typed_in["f"]) is source_sha256(len) is None
    # as a notebook's __main__, whose classes Python speaks of otherwise than of functions
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    exec("class F:\n def __call__(_, images): return images", {"__name__": "__main__"}, typed_in)
    assert source_sha256(typed_in["F"]()) is None
    extractor.name = "my network, version 2"
    assert source_sha256(extractor) is None and extractor_name(extractor) == "my network, version 2"


def test_a_partial_is_its_function_and_its_arguments(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "import torch\n@torch.no_grad()\ndef f(images, *_, **__): return images"
    (tmp_path / "my_partial_features.py").write_text(code)
    f = import_extractor("my_partial_features:f")
    assert source_sha256(f) == hashlib.sha256(code.encode()).hexdigest(), "and not of torch's no_grad"
    partials = [partial(f, *args, **named) for args in ((), (2,), ("2",)) for named in ({}, {"sizes": [1, 2.5]})]
    assert len({source_sha256(f), *map(source_sha256, partials)}) == 7
    assert source_sha256(partial(f, a=1, b=None)) == source_sha256(partial(f, b=None, a=1))
    assert extractor_name(partial(f, "2", b=(None, {1: True}))) == "my_partial_features:f('2', b=(None, {1: True}))"
    assert source_sha256(partial(len)) is None
    for unclear in (torch.ones(2), {"a", "b"}, [object()], {"f": f}):
        own = partial(f, network=unclear)
        kind = type(unclear).__name__
        with pytest.raises(ValueError, match=f"partial of my_partial_features:f with an argument of type {kind}, "):
            source_sha256(own)
        own.name = "version 2"
        assert source_sha256(own) is None and extractor_name(own) == "version 2"
        inside = partial(own, 3)
        assert extractor_name(inside) == "version 2(3)" and source_sha256(inside) != source_sha256(partial(own, 4))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_a_gpu_that_is_not_there_is_missed():
    with pytest.raises(ValueError, match="device='cuda:0': PyTorch sees no GPU here"):
        evaluate(SAMPLES, REFERENCE, features=small_extractors.pooled, device="cuda:0")


def test_the_command(files, tmp_path, capsys):
    figures = tmp_path / "new" / "figures.json"
    command = ["evaluate", *map(str, files), "--features", "small_extractors:complete", "--device", "cpu"]
    assert main([*command, "--metrics", "fid,recall", "--batch-size", "9"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["metrics"] == pytest.approx({name: EXPECTED[name] for name in ("fid", "recall")}, rel=1e-9)
    assert found["samples"] == 70 and found["extractor"] == "small_extractors:complete"
    assert found["samples_from"] == str(files[0]) and found["reference_from"] == str(files[1])
    assert f"fid        {EXPECTED['fid']:.6g}" in shown.err and "reference: 100%" in shown.err
    assert main([*command, "--json", str(figures)]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(figures.read_text())["metrics"] == pytest.approx(EXPECTED, rel=1e-9)


def test_the_command_finds_a_function_where_it_is_run(files, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry and Path(entry) != HERE])
    monkeypatch.delitem(sys.modules, "small_extractors")
    command = ["evaluate", *map(str, files), "--metrics", "fid", "--device", "cpu"]
    assert main([*command, "--features", "small_extractors:pooled"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["fid"] == pytest.approx(EXPECTED["fid"], rel=1e-9)


def test_the_commands_errors_are_one_line(files, tmp_path, monkeypatch):
    command = ["evaluate", *map(str, files)]
    with pytest.raises(SystemExit, match="calguide-fast: no Inception weights at .*; they are published at") as stop:
        main([*command, "--inception", str(tmp_path / "nothing.pth")])
    assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match="calguide-fast: .*nothing.npz"):
        main(["evaluate", str(tmp_path / "nothing.npz"), str(files[1]), "--features", "small_extractors:pooled"])
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dividing.py").write_text("1 / 0")
    (tmp_path / "unfinished.py").write_text("def f(:")
    for name, why in (
        ("dividing", "ZeroDivisionError: "),
        ("unfinished", "SyntaxError: "),
        ("no_such", "Mod.*Error: "),
    ):
        with pytest.raises(SystemExit, match=f"calguide-fast: features='{name}:f' cannot be imported: {why}") as stop:
            main([*command, "--features", f"{name}:f"])
        assert stop.value.code == 2 and "\n" not in str(stop.value)
