"""The table of settings: what is hashed, and that new options orphan no folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from calguide_fast.generation.job import Job
from calguide_fast.generation.options import options_of
from calguide_fast.generation.settings import LATER, differences, settings_hash, without_later

# of the first folders, which have to keep their hashes: a setting that is added goes into LATER, and not here
FIRST = "preset classifier softplus_beta sha256 num_samples batch_size seeds labels method steps eta guidance dtype"
FIRST = set(f"{FIRST} channels_last compile".split())
FIRST_GUIDANCE = "divergence alpha epsilon joint_temperature marginal_temperature entropy_weight adaptive_entropy"
FIRST_GUIDANCE += " entropy_scaling tilt tilt_on tilt_max scale sine_boost interval rule max_guidance add_factor"

CHANGED = {
    "classifier_weights": {"classifier": ["guide", "overconfident"], "classifier_weights": [1.0, 2.0]},
    "recurrence": {"recurrence": 2},
    "churn": {"method": "heun", "churn": 1.0},
    "s_tmin": {"method": "heun", "churn": 1.0, "s_tmin": 0.1},
    "s_tmax": {"method": "heun", "churn": 1.0, "s_tmax": 9.0},
    "s_noise": {"method": "heun", "churn": 1.0, "s_noise": 1.1},
    "sigma_min": {"method": "heun", "sigma_min": 0.1},
    "sigma_max": {"method": "heun", "sigma_max": 9.0},
    "cfg_scale": {"cfg_scale": 2.0},  # and the digits' null class with it
    "null_class": {"cfg_scale": 2.0, "null_class": 3},
}


def table(**options):
    return Job.of(options_of("digits", Path("x"), options)).settings()


def test_a_table_without_new_settings_is_as_the_first_were():
    assert set(table()) == FIRST and set(table()["guidance"]) == set(FIRST_GUIDANCE.split())


@pytest.mark.parametrize("name", LATER)
def test_a_new_setting_is_hashed_where_it_is_not_at_its_default(name):
    changed = CHANGED[name]
    found, without = table(**changed), table(**{other: changed[other] for other in changed if other != name})
    assert name in found and settings_hash(found) != settings_hash(without)
    assert name in [line.partition(":")[0] for line in differences(without, found)]


def test_settings_of_guidance_may_come_later(monkeypatch):
    monkeypatch.setattr("calguide_fast.generation.settings.LATER", {"guidance.new": 0.5})
    old = {"new": 0.5, "guidance": {"scale": 1.0}}
    assert without_later({"new": 0.5, "guidance": {"scale": 1.0, "new": 0.5}}) == old
    changed = {"new": 0.5, "guidance": {"scale": 1.0, "new": 0.6}}
    assert without_later(changed) == changed
    assert differences(old, changed) == ["guidance.new: 0.5 there, 0.6 here"]
