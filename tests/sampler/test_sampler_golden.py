"""The sampler against images that the original samplers made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from golden_networks import guide, network

from calguide_fast import FDivSampler, Guidance

GOLDEN = json.loads((Path(__file__).parent / "golden" / "trajectories.json").read_text())
ADM_G = Guidance("none", marginal_temperature=1.0, scale=2.0)
ELUCD = Guidance("none", marginal_temperature=0.5, scale=2.0, sine_boost=0.3)


@pytest.mark.parametrize(
    ("name", "guidance", "classifier_input", "method", "steps", "count"),
    [
        ("adm_g_ddpm", ADM_G, "xt", "ddpm", "10", 2),
        ("adm_g_ddim", ADM_G, "xt", "ddim", "ddim10", 2),
        # one image: EluCD reads its boost off the first of a batch, we off each
        ("elucd", ELUCD, "x0", "ddpm", "10", 1),
    ],
)
def test_the_original_samplers_images(name, guidance, classifier_input, method, steps, count, backend):
    sampler = FDivSampler(
        network, guide, guidance, classifier_input=classifier_input, class_conditional=True, shape=(3, 4, 4)
    )
    labels = [k % 5 for k in range(count)]
    found = sampler.sample(labels, seeds=range(count), steps=steps, method=method, progress=False)
    expected = torch.tensor(GOLDEN[name]).view(count, 3, 4, 4)
    torch.testing.assert_close(found.images, expected, rtol=0, atol=2e-5)
    # the trajectories are not trivial: guidance moves them
    unguided = FDivSampler(network, guidance=None, class_conditional=True, shape=(3, 4, 4))
    without = unguided.sample(labels, seeds=range(count), steps=steps, method=method, progress=False)
    assert (without.images - expected).abs().max() > 0.01
