"""Samplers: a student taken from noise to data in a few calls."""

from flowmap.samplers.anchored import Anchored
from flowmap.samplers.deterministic import Deterministic
from flowmap.samplers.gamma import Gamma

SAMPLERS = {"deterministic": Deterministic, "gamma": Gamma, "anchored": Anchored}
