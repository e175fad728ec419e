"""No setting is given and then left without effect."""

from __future__ import annotations

import pytest

from calguide_fast.karras import Churn
from calguide_fast.method_settings import check_method_settings

METHODS = ("ddpm", "ddim", "heun", "dpmpp")


@pytest.mark.parametrize(
    ("settings", "methods", "message"),
    [
        ({}, METHODS, None),
        ({"eta": 0.5}, ["ddim"], r"eta=0.5 has no effect with method='{}': it needs 'ddim'"),
        ({"variance": "fixed_large"}, ["ddpm"], r"variance='fixed_large' .* method='{}': it needs 'ddpm'"),
        ({"churn": Churn(3.0)}, ["heun"], r"churn=3.0 has no effect with method='{}': it needs 'heun'"),
        ({"churn": Churn(3.0, 0.1, 9.0, 1.1)}, ["heun"], r"churn=3.0 has no effect with method='{}'"),
        ({"sigma_range": (0.1, None)}, ["heun", "dpmpp"], r"sigma_range=\(0.1, None\) .*'{}': it needs 'heun' or 'dpm"),
    ],
)
def test_a_setting_that_does_nothing_is_refused(settings, methods, message):
    settings = {"eta": 0.0, "churn": Churn(), "sigma_range": (None, None), **settings}
    for method in METHODS:
        if method in methods:
            check_method_settings(method, **settings)
        else:
            with pytest.raises(ValueError, match=message.format(method)):
                check_method_settings(method, **settings)


@pytest.mark.parametrize("name", ["s_tmin", "s_tmax", "s_noise"])
def test_what_is_of_the_churn_needs_one(name):
    with pytest.raises(ValueError, match=f"{name}=7.0 has no effect without churn, which is 0"):
        check_method_settings("heun", 0.0, Churn(**{name: 7.0}), (None, None))
    check_method_settings("heun", 0.0, Churn(1.0, **{name: 7.0}), (None, None))
