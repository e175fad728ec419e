"""Loading weights: every format and wrapping that is accepted, and everything that is refused."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from calguide_fast.models import EncoderUNet, load_checkpoint, resnet18


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def trained(seed=0):
    torch.manual_seed(seed)
    model = network()
    for value in model.state_dict().values():
        value.copy_(torch.randn(value.shape) * 3 + 7)
    return model


def assert_same_weights(actual, expected):
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["bare", "state_dict", "model", "prefix", "state_dict with prefix"],
)
@pytest.mark.parametrize("legacy_format", [False, True])
def test_torch_files(tmp_path, wrap, legacy_format):
    path = tmp_path / "weights.pt"
    torch.save(wrap(trained().state_dict()), path, _use_new_zipfile_serialization=not legacy_format)
    model = network()
    assert load_checkpoint(model, path) is model
    assert_same_weights(model, trained())


def test_safetensors_and_a_string_path(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(trained().state_dict(), path)
    assert_same_weights(load_checkpoint(network(), str(path)), trained())


def test_weights_are_cast_to_the_dtypes_of_the_module(tmp_path):
    options = dict(image_size=8, in_channels=3, model_channels=32, out_channels=6, num_res_blocks=1)
    options.update(attention_resolutions=(), channel_mult=(1,))
    source = EncoderUNet(**options)
    torch.save({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "half.pt")
    model = load_checkpoint(EncoderUNet(**options, use_fp16=True), tmp_path / "half.pt")
    assert model.input_blocks[0][0].weight.dtype is torch.float16
    assert model.time_embed[0].weight.dtype is torch.float32
    assert torch.equal(model.time_embed[0].weight, source.time_embed[0].weight.half().float())


def test_module_on_the_meta_device_gets_the_weights(tmp_path):
    torch.save({key: value.double() for key, value in trained().state_dict().items()}, tmp_path / "weights.pt")
    with torch.device("meta"):
        model = network()
    load_checkpoint(model, tmp_path / "weights.pt")
    assert_same_weights(model, trained())
    assert model[0].weight.dtype is torch.float32
    assert model[0].weight.requires_grad
    with torch.device("meta"):
        model = network()
    torch.save({"0.bias": torch.zeros(4)}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="missing: 0.weight"):
        load_checkpoint(model, tmp_path / "part.pt", strict=False)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_older_than_the_batch_counter(tmp_path, device):
    state = {key: value for key, value in trained().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pth")
    with torch.device(device):
        model = network()
    load_checkpoint(model, tmp_path / "old.pth")
    assert torch.equal(model[1].running_var, state["1.running_var"])
    assert model[1].num_batches_tracked == 0


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_checkpoint(network(), tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(network(), tmp_path)


class Payload:
    """What an attacker puts in a pickle: unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pkl"])
@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickle_that_needs_code_is_refused_and_not_executed(tmp_path, name, plain_pickle):
    path, trace = tmp_path / name, tmp_path / "trace"
    if plain_pickle:
        path.write_bytes(pickle.dumps(Payload(trace), protocol=2))
    else:
        torch.save({"state_dict": network().state_dict(), "extra": Payload(trace)}, path)
    with pytest.raises(ValueError, match=rf"{name} was refused.*If you trust it"):
        load_checkpoint(network(), path)
    assert not trace.exists()
    # the payload is live: a reader that trusts the file does run it
    if plain_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert trace.is_dir()


def test_whole_pickled_module_is_refused(tmp_path):
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"state_dict\(\) alone"):
        load_checkpoint(network(), tmp_path / "module.pt")


@pytest.mark.parametrize("name", ["bad.pt", "bad.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"not a checkpoint, only words\n", b"PK\x03\x04 cut short", bytes(range(256))]
)
def test_damaged_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_checkpoint(network(), tmp_path / name)


@pytest.mark.parametrize("legacy_format", [False, True])
@pytest.mark.parametrize("cut", [1, 20, 300, 900])
def test_truncated_file(tmp_path, legacy_format, cut):
    torch.save(trained().state_dict(), tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy_format)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:-cut])
    # what PyTorch says of it goes on for lines
    with pytest.raises(ValueError, match=r"cut.pt was refused: it is damaged|cut.pt is not a [^.]+\. Was it copied"):
        load_checkpoint(network(), tmp_path / "cut.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), {}, {"epoch": 3}, [torch.zeros(3)], {0: torch.zeros(3)}])
def test_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_checkpoint(network(), tmp_path / "other.pt")


def test_mismatch_names_keys_and_shapes_and_changes_nothing(tmp_path):
    state = trained().state_dict()
    state["extra.weight"] = torch.zeros(2, 5)
    state["2.weight"] = torch.zeros(9, 4)
    del state["0.bias"]
    torch.save(state, tmp_path / "other.pt")
    model, before = trained(1), trained(1)
    with pytest.raises(ValueError) as raised:
        load_checkpoint(model, tmp_path / "other.pt")
    message = str(raised.value)
    assert "other.pt does not fit Sequential" in message
    assert "1 missing: 0.bias (4,)" in message
    assert "1 unexpected: extra.weight (2, 5)" in message
    assert "1 of another shape: 2.weight (9, 4) instead of (2, 4)" in message
    assert_same_weights(model, before)


def test_long_lists_are_cut(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"102 missing.*and \d+ more; 1 unexpected: a \(1,\)") as raised:
        load_checkpoint(resnet18(num_classes=2), tmp_path / "a.pt")
    assert len(str(raised.value)) < 600


def test_not_strict_takes_what_fits_but_no_other_shape(tmp_path):
    state = trained().state_dict()
    del state["0.bias"]
    state["extra.weight"] = torch.zeros(2)
    torch.save(state, tmp_path / "part.pt")
    model = trained(1)
    load_checkpoint(model, tmp_path / "part.pt", strict=False)
    assert torch.equal(model[0].weight, state["0.weight"])
    assert torch.equal(model[0].bias, trained(1)[0].bias)
    state["2.weight"] = torch.zeros(9, 4)
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError, match="another shape"):
        load_checkpoint(model, tmp_path / "part.pt", strict=False)
