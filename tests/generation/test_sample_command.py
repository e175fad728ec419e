"""``calguide-fast sample``, end to end, on the demo's digits: stopped, killed, resumed, shared out, refused."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from calguide_fast import FDivSampler, Guidance, __version__, use_backend
from calguide_fast.backends import choose
from calguide_fast.cli import _parser, main
from calguide_fast.demo.checkpoints import load_guide, load_unet
from calguide_fast.generation import commands, folder, job, networks, run, team
from calguide_fast.generation.interrupts import Interrupts
from calguide_fast.generation.job import Job
from calguide_fast.generation.options import options_of
from calguide_fast.generation.shards import Shards
from calguide_fast.generation.team import Team
from calguide_fast.guidance import SETTINGS
from calguide_fast.models.specs import LoadedClassifier
from calguide_fast.schedule import Schedule

IMAGES, BATCH = 11, 3
BATCHES = 4
OPTIONS = ["sample", "--preset", "digits", "--num-samples", str(IMAGES), "--batch-size", str(BATCH), "--steps", "3"]
# the tilt makes images depend on the batch that they are sampled in
OPTIONS += ["--seeds", "5-14,99", "--labels", "random", "--tilt", "-0.2"]
NPZ = f"samples_{IMAGES}x8x8x1.npz"
MODULE = [sys.executable, "-m", "calguide_fast"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", MODULE[2]]


def sample(folder, *options: str) -> int:
    return main([*OPTIONS, "--out", str(folder), *options])


def launch(command, *options, timeout: float = 120) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *map(str, options)], capture_output=True, text=True, timeout=timeout)


def same_bytes(one, other) -> bool:
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*.[np][np][gyz]")) for folder in (one, other)]
    assert names[0] == names[1] and len(names[0]) >= BATCHES + 2, names
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One process, run through."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert sample(folder) == 0
    return folder


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of the finished run that lacks its outputs and its last two batches."""
    folder = shutil.copytree(finished, tmp_path / "begun")
    for path in (folder / NPZ, folder / "grid.png", *(folder / "shards" / f"00000{b}.npy" for b in (2, 3))):
        path.unlink()
    manifest = folder / "shards" / "manifest-0.jsonl"
    manifest.write_text("".join(manifest.read_text().splitlines(keepends=True)[:2]))
    return folder


def count_batches(monkeypatch) -> list[int]:
    """The batches written from now on."""
    written, write = [], Shards.write
    monkeypatch.setattr(Shards, "write", lambda self, batch, *what: (written.append(batch), write(self, batch, *what)))
    return written


def test_the_images_are_the_samplers(finished):
    guidance = Guidance("js", alpha=1.0, epsilon=0.9, scale=0.2, sine_boost=0.3, tilt=-0.2)
    sampler = FDivSampler(load_unet(), load_guide(softplus_beta=3.0), guidance, num_classes=10)
    expected = sampler.sample(IMAGES, seeds=[*range(5, 15), 99], steps=3, batch_size=BATCH, progress=False)
    with np.load(finished / NPZ) as file:
        assert (file["arr_0"] == expected.to_uint8().numpy()).all()
        assert (file["arr_1"] == expected.labels.numpy()).all() and (file["seeds"] == expected.seeds.numpy()).all()
        assert file["batch_size"] == BATCH
    assert (finished / "grid.png").stat().st_size > 500


@pytest.mark.parametrize(
    ("options", "settings", "process"),
    [
        (
            ["--method", "heun", "--rule", "edm", "--max-guidance", "0.1", "--add-factor", "0.3"],
            {"rule": "edm", "max_guidance": 0.1, "add_factor": 0.3},
            {"method": "heun"},
        ),
        (
            ["--method", "heun", "--churn", "9", "--s-tmin", "0.1", "--s-tmax", "20", "--s-noise", "1.1"],
            {"churn": 9.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.1},
            {"method": "heun"},
        ),
        (
            ["--method", "dpmpp", "--sigma-min", "0.05", "--sigma-max", "30"],
            {"sigma_range": (0.05, 30)},
            {"method": "dpmpp"},
        ),
        (["--method", "heun", "--sigma-max", "30"], {"sigma_range": (0.01, 30)}, {"method": "heun"}),
        (["--recurrence", "2", "--sine-boost", "0.3"], {"sine_boost": 0.3}, {"recurrence": 2}),
        (["--cfg-scale", "2.5", "--sine-boost", "0.3"], {"sine_boost": 0.3, "cfg_scale": 2.5, "null_class": 10}, {}),
        (
            ["--cfg-scale", "2.5", "--null-class", "3", "--sine-boost", "0"],
            {"cfg_scale": 2.5, "null_class": 3},
            {},
        ),
        (
            ["--classifier", "guide", "--classifier", "overconfident", "--classifier-weights", "3", "1"]
            + ["--sine-boost", "0"],
            {"classifier_weights": (3, 1)},
            {},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_reach_the_sampler(options, settings, process, tmp_path):
    folder, settings = tmp_path / "run", dict(settings)
    command = ["sample", "--preset", "digits", "--num-samples", "4", "--steps", "3", "--labels", "3,7"]
    assert main([*command, *options, "--out", str(folder)]) == 0
    if "sigma_range" in settings:
        # the linear schedule's lowest, which is above EDM's
        settings["sigma_range"] = max(settings["sigma_range"][0], Schedule.linear().sigmas[0]), 30
    classifiers = [load_guide(overconfident=wild, softplus_beta=3.0) for wild in (False, True)]
    if "classifier_weights" not in settings:
        classifiers.pop()
    guidance = {name: settings.pop(name) for name in SETTINGS & set(settings)}
    guidance = Guidance(**{"scale": 0.2, **guidance})
    sampler = FDivSampler(load_unet(), classifiers, guidance, **settings)
    expected = sampler.sample([3, 7, 3, 7], seeds=range(4), steps=3, progress=False, **process)
    with np.load(folder / "samples_4x8x8x1.npz") as file:
        assert (file["arr_0"] == expected.to_uint8().numpy()).all()


def test_several_classifiers_are_on_record(tmp_path):
    command = ["sample", "--preset", "digits", "--num-samples", "1", "--steps", "1", "--out", str(tmp_path / "run")]
    both = ["--classifier", "guide", "--classifier", "overconfident"]
    assert main([*command, *both]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["classifier"] == ["guide", "overconfident"]
    assert list(settings["sha256"]) == ["unet", "classifier", "classifier_2"]
    assert len(set(settings["sha256"].values())) == 3
    # equal ones are what there is without weights, and only their ratio matters
    assert main([*command, *both, "--classifier-weights", "2", "2", "--resume"]) == 0
    with pytest.raises(SystemExit, match=r"classifier_weights: None there, \[0.75, 0.25\] here"):
        main([*command, *both, "--classifier-weights", "3", "1", "--resume"])


def test_config_says_what_was_run(finished):
    config = json.loads((finished / "config.json").read_text())
    settings, (run,) = config["settings"], config["runs"]
    assert settings["seeds"] == "5-14,99" and settings["labels"] == "random" and settings["steps"] == 3
    assert settings["guidance"]["tilt"] == -0.2 and settings["guidance"]["scale"] == 0.2
    assert (
        len(settings["sha256"]["unet"]) == len(settings["sha256"]["classifier"]) == len(config["settings_sha256"]) == 64
    )
    assert run["torch"] == torch.__version__ and run["calguide_fast"] == __version__ and run["python"]
    (process,) = run["processes"]
    assert process["device"] == "cpu" and process["threads"] == 1 and process["make"] == platform.machine()
    assert process["backend"] == choose(torch.zeros(1)).__name__.rpartition(".")[2]
    assert run["checkpoints"]["classifier"].endswith("guide.safetensors")


def test_what_may_round_otherwise_is_said_and_refuses_nothing(begun, finished, capsys):
    path = begun / "config.json"
    config = json.loads(path.read_text())
    with use_backend("reference"):
        assert sample(begun, "--resume") == 0
    assert json.loads(path.read_text())["runs"][1]["processes"][0]["backend"] == "reference"
    backend = config["runs"][0]["processes"][0]["backend"]
    assert f"round otherwise: backend: ['{backend}'] there, ['reference'] here\n" in capsys.readouterr().err
    # older folders have no processes on record; None is one that was never heard
    for spoil, said in (
        (lambda run: run.pop("processes"), ""),
        (lambda run: run["processes"].append(None), ""),
        (lambda run: run["processes"][0].update(threads=4), "round otherwise: threads: [4] there, [1] here\n"),
        (lambda run: run.update(torch="2.0"), f"round otherwise: torch: 2.0 there, {torch.__version__} here\n"),
    ):
        changed = copy.deepcopy(config)
        spoil(changed["runs"][0])
        path.write_text(json.dumps(changed))
        assert sample(begun, "--resume") == 0
        error = capsys.readouterr().err
        assert said in error and ("round otherwise" in error) == bool(said)


def test_two_processes_give_the_bytes_of_one(finished, tmp_path):
    done = launch(TORCHRUN, *OPTIONS, "--out", tmp_path / "run")
    assert done.returncode == 0 and done.stdout.count(NPZ) == 1, done.stderr
    assert same_bytes(finished, tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "config.json").read_text())["runs"][0]["processes"]) == 2


def test_what_a_dead_process_had_in_hand_is_sampled_by_rank_0(finished, tmp_path, monkeypatch, capsys):
    store = distributed.HashStore()
    first, dead = (Team(Interrupts(pytest.fail), rank, 2, store) for rank in range(2))
    taken = [next(dead.deal(range(BATCHES))) for _ in range(2)]
    assert taken == [0, 1]
    monkeypatch.setattr(team, "COME_SECONDS", 0.1)
    monkeypatch.setattr(run, "PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(run, "PATIENCE_BATCHES", 0.0)
    options = _parser().parse_args([*OPTIONS, "--out", str(tmp_path / "run")])
    assert commands.sample(Job.of(options), options.out, False, first) == tmp_path / "run" / NPZ
    assert same_bytes(finished, tmp_path / "run")
    error = capsys.readouterr().err
    assert "no word from rank 1:" in error
    assert all(f"batch {batch} is sampled here, too" in error for batch in taken) and "batch 2" not in error


def test_patience_follows_what_batches_took(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    took = Shards(finished, config["settings_sha256"]).seconds()
    assert list(took) == [*range(BATCHES)] and min(took.values()) > 0
    (tmp_path / "shards").mkdir()
    theirs, pixels = Shards(tmp_path, "settings", rank=1), np.zeros((1, 2, 2, 1), np.uint8)
    # batches 2 and 3 are this run's; what those before it took is better than nothing
    for batch, seconds, patience in ((0, None, 60), (1, 400.0, 1200), (2, 50.0, 150), (3, 70.0, 210), (2, 1.0, 210)):
        theirs.write(batch, pixels, seconds)
        assert run._patience(Shards(tmp_path, "settings"), [2, 3]) == patience
    assert run._patience(Shards(tmp_path, "others"), [2, 3]) == run.PATIENCE_SECONDS


# the worst moment: the third shard is written, and not yet in its place
KILLED = """
import os, signal, sys
replace = os.replace
def kill(source, target):
    if target.name == "000002.npy":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = kill
from calguide_fast.cli import main
main(sys.argv[1:])
"""


def test_a_killed_run_resumes_to_the_same_bytes(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    done = launch([sys.executable, "-c", KILLED], *OPTIONS, "--out", folder)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [p.name.split(".")[0] for p in sorted(folder.glob("shards/*.npy*"))] == ["000000", "000001", "000002"]
    written = count_batches(monkeypatch)
    assert sample(folder, "--resume") == 0
    assert written == [2, 3] and same_bytes(finished, folder)
    assert not list(folder.rglob("*.partial")) and len(json.loads((folder / "config.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=lambda signum: signum.name)
def test_a_signal_finishes_the_batch_in_hand(signum, finished, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signum)
    written, write = [], Shards.write

    def stopped(self, batch, *what):
        if batch == 1:
            os.kill(os.getpid(), signum)
        write(self, batch, *what)
        written.append(batch)

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "write", stopped)
        assert sample(tmp_path / "run") == 128 + signum
    error = capsys.readouterr().err
    assert written == [0, 1] and signal.getsignal(signum) == before
    assert "the batch in hand is finished first" in error and "with --resume samples what is missing" in error
    assert sample(tmp_path / "run", "--resume") == 0 and same_bytes(finished, tmp_path / "run")


def test_a_signal_while_outputs_are_written_leaves_none_by_half(begun, finished, monkeypatch):
    write_outputs = commands.write_outputs

    def stopped(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write_outputs(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(commands, "write_outputs", stopped)
        assert sample(begun, "--resume") == 143
    assert not list(begun.glob("*.npz*")) and not list(begun.glob("*.png*"))
    assert sample(begun, "--resume") == 0 and same_bytes(finished, begun)


def test_a_damaged_shard_is_named_and_redone(begun, finished, monkeypatch, capsys):
    path = begun / "shards" / "000000.npy"
    path.write_bytes(path.read_bytes()[:-10])
    written = count_batches(monkeypatch)
    assert sample(begun, "--resume") == 0
    assert written == [0, 2, 3] and f"{path} is damaged" in capsys.readouterr().err
    assert same_bytes(finished, begun)


def test_a_full_disk_is_one_line_and_loses_nothing(begun, finished, monkeypatch, capsys):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            SystemExit, match=r"calguide-fast: .*No space left on device: '.*\.(npy|jsonl|npz)'"
        ) as stop:
            sample(begun, "--resume")
    assert "batches that are done are kept; the same command with --resume" in capsys.readouterr().err
    assert stop.value.code == 1
    assert len(list(begun.glob("shards/*.npy"))) >= 3
    assert sample(begun, "--resume") == 0 and same_bytes(finished, begun)


def test_a_lost_store_is_one_line(begun, finished, monkeypatch, capsys):
    def lost(*_):
        raise distributed.DistNetworkError("connection was closed")

    with monkeypatch.context() as patched:
        patched.setattr(Team, "add", lost)
        assert sample(begun, "--resume") == 1
    error = capsys.readouterr().err
    assert "does not answer: connection was closed; the same command with --resume" in error
    assert sample(begun, "--resume") == 0 and same_bytes(finished, begun)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--scale", "0.3"], ["guidance.scale: 0.2 there, 0.3 here"]),
        (["--steps", "4", "--labels", "1"], ["steps: 3 there, 4 here", "labels: random there, 1 here"]),
        (["--classifier", "overconfident"], ["classifier: guide there, overconfident here", "sha256.classifier: "]),
        (["--batch-size", "4"], ["batch_size: 3 there, 4 here"]),
        (["--seeds", "5-15"], ["seeds: 5-14,99 there, 5-15 here"]),
        (["--recurrence", "2"], ["recurrence: 1 there, 2 here"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_other_settings_are_refused_by_name(begun, options, named):
    before = (begun / "config.json").read_bytes()
    with pytest.raises(SystemExit, match="begun with other settings") as stop:
        sample(begun, "--resume", *options)
    assert all(name in str(stop.value) for name in named), stop.value
    assert "guidance.tilt" not in str(stop.value) and (begun / "config.json").read_bytes() == before


def test_folders_that_are_not_to_be_touched(begun, tmp_path):
    with pytest.raises(SystemExit, match="is not empty: give --resume"):
        sample(begun)
    (tmp_path / "mine.partial").touch()
    for options, message in ([], "is not empty"), (["--resume"], "holds no config.json of an earlier run"):
        with pytest.raises(SystemExit, match=message):
            sample(tmp_path, *options)
    assert (tmp_path / "mine.partial").exists()
    (begun / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="config.json is no readable JSON"):
        sample(begun, "--resume")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "1001"], "asks for 1001 timesteps"),
        (["--method", "euler"], "method='euler' must be one of"),
        (["--divergence", "kl"], "divergence='kl'"),
        (["--recipe", "elucd", "--alpha", "2"], "alpha=2.0 is of a divergence, and the recipe elucd has none"),
        (["--recipe", "unguided", "--scale", "2"], "has no guidance, and takes none of scale, tilt"),
        (["--classifier", "resnet50:a.pth"], "brings its own, guide or overconfident"),
        (["--unet", "a.pt"], "brings its own UNet"),
        (["--preset", "imagenet128"], "needs its weights: --unet PATH"),
        (["--preset", "imagenet128", "--unet", "a.pt"], "guidance needs a classifier: .*imagenet128:PATH"),
        (["--preset", "imagenet128", "--unet", "no.pt", "--classifier", "resnet50:a.pth"], "no checkpoint at no.pt"),
        (["--scale", "inf"], "scale=inf must be finite"),
        (["--scale", "1e38"], "images 0-2 are not all finite"),
        (["--softplus-beta", "-1"], "softplus-beta=-1.0 must be finite and at least 0"),
        (["--grid", "-1"], "grid must be a number of images, 0 or more, got -1"),
        (["--device", "cuda"], "PyTorch sees no GPU here"),
        (["--device", "abacus"], "device='abacus' is no device of PyTorch's"),
        (["--rule", "edm", "--method", "ddim"], "rule='edm' belongs to method='heun'"),
        (["--max-guidance", "0.1"], "max_guidance=0.1 has no effect with rule='score', whose strength is scale"),
        (["--rule", "edm", "--scale", "1"], "scale=1.0 has no effect with rule='edm', whose strength is max_guidance"),
        (["--churn", "3"], "churn=3.0 has no effect with method='ddpm': it needs 'heun'"),
        (["--eta", "0.5"], "eta=0.5 has no effect with method='ddpm': it needs 'ddim'"),
        (["--sigma-max", "30"], "sigma_range=.None, 30.0. has no effect with method='ddpm': it needs"),
        (["--method", "heun", "--s-noise", "1.1"], "s_noise=1.1 has no effect without churn, which is 0"),
        (["--method", "heun", "--sigma-max", "300"], "sigma_range=.*must rise, and lie within the model's range"),
        (["--recurrence", "2", "--method", "dpmpp"], "recurrence needs 'ddpm', 'ddim' or 'heun'"),
        (["--null-class", "10"], "null-class=10 has no use without --cfg-scale"),
        (["--cfg-scale", "2", "--null-class", "11"], "null-class=11 is no label of the model, which knows 0..10"),
        (
            ["--preset", "imagenet64", "--unet", "a", "--classifier", "resnet50:a", "--cfg-scale=2"],
            "needs --null-class",
        ),
        (["--classifier-weights", "1", "2"], "classifier_weights has 2 entries for 1 classifiers"),
        (["--device", "meta"], "device='meta' has shapes alone, and computes nothing"),
        (["--tilt", "0", "--tilt-max", "2"], "tilt_max=2.0 has no effect without tilt"),
        (["--adaptive-entropy"], "adaptive_entropy=True has no effect without entropy_weight"),
        (["--tilt", "0.5", "--batch-size", "1"], "tilt=0.5 has no effect with batch_size=1"),
        (["--seeds", f"0-{10**20}"], f"seeds 0-{10**20} are {10**20 + 1} and num-samples is {IMAGES}"),
        (["--seeds", "0-10000000", "--num-samples", "10000001"], "10000001 images are too many for one run"),
        (["--labels", f"1,3-{10**20}"], f"labels='1,3-{10**20}' has {10**20}: labels must lie in 0..9"),
        (["--out", "{file}"], "out=.*file must be a folder, and .*file is a file"),
        (["--out", "{file}/inside/it"], "out=.*file/inside/it must be a folder, and .*file is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=f"^calguide-fast: .*{message}") as stop:
        sample(tmp_path / "run", *(option.format(file=tmp_path / "file") for option in options))
    assert capsys.readouterr().err == f"{stop.value}\n" and "\n" not in str(stop.value)
    assert stop.value.code == (1 if "not all finite" in message else 2)
    assert not list((tmp_path / "run").glob("shards/*.npy"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory: CUDA out of memory"),
    ],
)
def test_a_lack_of_memory_is_one_line(error, said, begun, monkeypatch):
    def lacking(*_, **__):
        raise error

    monkeypatch.setattr(run, "_sample", lacking)
    with pytest.raises(SystemExit, match=f"^calguide-fast: {said}$") as stop:
        sample(begun, "--resume")
    assert stop.value.code == 1


def test_what_the_parser_refuses_is_one_line_too(capsys):
    for options, said in (
        (["sample"], "calguide-fast sample: error: the following arguments are required: --preset, --out"),
        ([*OPTIONS, "--out", "x", "--grid", "many"], "calguide-fast sample: error: argument --grid: invalid int value"),
        (["reproduce", "cifar10"], "calguide-fast reproduce: error: argument table: invalid choice: 'cifar10'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(options)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith(said) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["elucd", "--classifier", "resnet101:{}"], ("none", 1.0, 0.5, 0.3, 3.0, "resnet101")),
        (["ours", "--classifier", "resnet50:{}"], ("js", 1.0, 0.5, 0.3, 3.0, "resnet50")),
        (["ours", "--classifier", "resnet50:{}", "--softplus-beta", "0"], ("js", 1.0, 0.5, 0.3, None, "resnet50")),
        (["elucd", "--classifier", "resnet18:{}", "--method", "ddim"], ("none", 1.0, 0.5, 0.0, 3.0, "resnet18")),
        (["ours", "--classifier", "imagenet128:{}"], ("js", 1.0, 0.5, 0.3, None, "imagenet128")),
        (["adm-g", "--classifier", "imagenet128:{}"], ("none", 0.5, 1.0, 0.0, None, "imagenet128")),
        (
            ["elucd-edm", "--classifier", "resnet101:{}", "--method", "heun"],
            ("none", 1.0, 0.0, 0.0, 5.0, "resnet101"),
        ),
    ],
    ids=lambda value: " ".join(value[:1] + value[3:]) if isinstance(value, list) else "",
)
def test_published_recipes(options, expected, tmp_path, monkeypatch):
    """With the digits' networks in the place of the published ones, whose weights are not at hand."""
    betas = []

    def load_classifier(spec, softplus_beta):
        betas.append(softplus_beta)
        return LoadedClassifier(load_guide(), "x0", "imagenet128" if spec.startswith("imagenet") else None)

    monkeypatch.setattr(networks, "load_unet", lambda preset, path: load_unet())
    monkeypatch.setattr(networks, "load_classifier", load_classifier)
    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"weights")
    common = ["sample", "--preset", "imagenet128", "--unet", str(weights), "--out", str(tmp_path / "run"), "--steps=2"]
    common += ["--num-samples", "2", "--labels", "0,1", "--recipe"]
    assert main([*common, *(option.format(weights) for option in options)]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    guidance = settings["guidance"]
    found = [guidance[name] for name in ("divergence", "scale", "marginal_temperature", "sine_boost")]
    assert (*found, settings["softplus_beta"], settings["classifier"]) == expected
    assert betas == ([expected[-2]])
    edm = ("edm", 0.004, 0.3) if options[0] == "elucd-edm" else ("score", 0.001, 0.0)
    assert (guidance["rule"], guidance["max_guidance"], guidance["add_factor"]) == edm
    assert settings["labels"] == "0-1" and settings["batch_size"] == 64
    assert settings["sha256"] == dict.fromkeys(["unet", "classifier"], hashlib.sha256(b"weights").hexdigest())
    # of another resolution than a noise-aware classifier
    if expected[-1] == "imagenet128":
        with pytest.raises(SystemExit, match="imagenet128 knows no noisy images of imagenet256"):
            main([*common, *(option.format(weights) for option in options), "--preset", "imagenet256", "--resume"])


def test_classifiers_that_see_different_things_do_not_guide_together(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "load_unet", lambda preset, path: load_unet())
    monkeypatch.setattr(
        networks,
        "load_classifier",
        lambda spec, _: LoadedClassifier(load_guide(), *(("xt", "imagenet128") if "128" in spec else ("x0", None))),
    )
    options = ["sample", "--preset", "imagenet128", "--unet", "u", "--out", str(tmp_path), "--softplus-beta", "0"]
    with pytest.raises(SystemExit, match="classifiers imagenet128, resnet50 do not guide together"):
        main([*options, "--classifier", "imagenet128:a", "--classifier", "resnet50:b"])


def test_unguided_sampling_needs_no_classifier(tmp_path):
    options = [
        "sample",
        "--preset",
        "digits",
        "--num-samples",
        "2",
        "--steps",
        "2",
        "--recipe",
        "unguided",
        "--grid",
        "0",
    ]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["guidance"] is settings["classifier"] is None and list(settings["sha256"]) == ["unet"]
    assert not (tmp_path / "run" / "grid.png").exists()


def test_a_folder_that_is_not_shared_is_noticed(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "SHARED_SECONDS", 0.2)
    settings, checks = folder.read_config(finished)["settings"], []
    folder.see_folder(finished, settings, pytest.fail)
    for other, found in (tmp_path, settings), (finished, {**settings, "steps": 4}):
        with pytest.raises(ValueError, match="is not the folder that rank 0 opened"):
            folder.see_folder(other, found, lambda: checks.append(None))
    assert len(checks) >= 2


@pytest.mark.parametrize("difference", [{"scale": 3.0}, {"batch_size": 2}, {}], ids=["option", "batch", "file"])
def test_processes_with_other_settings_do_not_share_a_run(difference, tmp_path, monkeypatch):
    store = distributed.HashStore()
    first, second = (Team(Interrupts(pytest.fail), rank, 2, store) for rank in range(2))
    settings = commands.agreed_settings(Job.of(options_of("digits", tmp_path, {})), first)
    assert settings == commands.agreed_settings(Job.of(options_of("digits", tmp_path, {})), second)
    if not difference:
        # the same options, and another file on this machine's disk
        monkeypatch.setattr(job, "file_hash", lambda path: "0" * 64)
    name = next(iter(difference), "sha256.unet")
    with pytest.raises(
        ValueError, match=rf"other settings than rank 0, which is there:\n  (guidance\.)?{name}: .* here"
    ):
        commands.agreed_settings(Job.of(options_of("digits", tmp_path, difference)), second)


def test_a_missing_checkpoint_is_advised_on_before_it_is_hashed(tmp_path):
    """As in a sweep, which needs the hash to know what is sampled already."""
    (tmp_path / "unet.pt").touch()
    for unet, classifier, missing in (("no.pt", "a.pth", "no.pt"), (tmp_path / "unet.pt", "a.pth", "a.pth")):
        options = options_of("imagenet128", tmp_path, {"unet": Path(unet), "classifier": [f"resnet50:{classifier}"]})
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at {missing}: nothing is downloaded here"):
            Job.of(options).settings()


def test_help_states_what_was_published(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for words in ("elucd: 1, published for imagenet128", "imagenet128 0.5", "alpha 1 and epsilon 0.9, which are ours"):
        assert words in text


@pytest.mark.full
def test_two_thousand_digits_killed_and_resumed_by_two_processes(tmp_path):
    options = ["sample", "--preset", "digits", "--batch-size", "50", "--out"]
    assert launch(MODULE, *options, tmp_path / "one", timeout=600).returncode == 0
    run = subprocess.Popen([*MODULE, *options, tmp_path / "two"], stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("two/shards/*.npy"))) < 20:
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL and not list(tmp_path.glob("two/*.npz"))
    done = launch(TORCHRUN, *options, tmp_path / "two", "--resume", timeout=600)
    assert done.returncode == 0, done.stderr
    assert same_bytes(tmp_path / "one", tmp_path / "two")
    assert len(list(tmp_path.glob("two/shards/manifest-*.jsonl"))) == 2
