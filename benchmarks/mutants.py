"""Would the tests of an objective notice that it is wrong?  One textual mutation at a time.

The objective tests run against each mutant.
`python benchmarks/mutants.py [NAME ...] [--jobs N]`; exit 1 if a mutant survives.
A mutation whose text is not found exactly once is an error: it must be updated with the code.  Each mutant is a copy of
the package in a scratch folder, tested there by `pytest -x tests/objectives` in a process of its own.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
FM, AYF, DERIVATIVE, DISTANCE = (
    "objectives/flow_matching.py",
    "objectives/ayf.py",
    "flow/derivative.py",
    "flow/distance.py",
)
RECTIFIED, PERCEPTUAL = "objectives/rectified.py", "objectives/perceptual.py"
ALPHA = "objectives/alpha_flow.py"
ANCHORED, RCGM = "objectives/facm.py", "objectives/rcgm.py"
MF, CT, SELF, SHORT = (
    "objectives/meanflow.py",
    "objectives/scm.py",
    "objectives/self_distilled.py",
    "objectives/shortcut.py",
)
TANGENT = "objectives/tangent.py"
PI, POLICY = "objectives/pi_flow.py", "flow/policy.py"
LEDI = "objectives/lediflow.py"
INSTA = "objectives/instaflow.py"
FREE, CM, MID = "objectives/freeflow.py", "objectives/consistency.py", "objectives/cmt.py"
ADV = "objectives/adversarial.py"
SCORE, DRAWING = "objectives/score_distillation.py", "objectives/drawing.py"
MATCH, KL, JOINT = "objectives/matching.py", "objectives/reverse_kl.py", "objectives/joint.py"
OWN, MEANS = "objectives/self_fake.py", "objectives/mean_velocity_match.py"
TWIN = "objectives/twin.py"
UNSURE = "objectives/uncertainty.py"


class Mutant(NamedTuple):
    objective: str
    what: str
    file: str
    old: str
    new: str


ADV_STUDENT = "return pairing_loss(scores(fake, cond, noise), of_real).mean()"
ADV_PENALTY = "value = value + (r1 * on_real.mean() + r2 * on_fake.mean()) / 2"
KL_ASK = "real, fake = teacher.velocity(x, t, cond), network.mean_velocity(x, t, t, cond)"
MATCH_G = "g = broadcast_time(sample.t, x) * (real - fake)"
MATCH_AWAY = "away = (sample.x0 - (x - broadcast_time(sample.t, x) * real)).abs().flatten(1).mean(1)"
MATCH_LOSS = "loss = gradient_as_target(sample.x0, direction.to(sample.x0.dtype)) / (2 * x[0].numel())"
SCORE_STOP = "self.calls == self.at and torch.is_grad_enabled()"
EMD_G = "g = (mean_velocity.detach() - v) + r * broadcast_time(t - s, x) * rate"
LMD_G = "g = mean_velocity.detach() - (teacher.velocity(arrival, s, cond) + r * broadcast_time(t - s, x) * rate)"
ASK_STUDENT = "student.mean_velocity(sample.xt, sample.t, sample.t, sample.cond)"
ASK_TEACHER = "teacher.velocity(sample.xt, sample.t, sample.cond)"
ARRIVAL = "arrival = x + broadcast_time(s - t, x) * mean_velocity.detach()"
STILL = "still = ~sample.moving if needed else torch.ones(len(sample.t), dtype=torch.bool)"
BACK = "return mean_velocity[place], rate[place]"
EMD_TEACHER = "v = sample.vt if teacher is None else teacher.velocity(x, t, cond)"
WARM_UP = "return min(self.r_max, step / self.warmup_steps) if self.warmup_steps else self.r_max"
TARGET = "target = (_wide(F) - _wide(g)).detach()"
PAIR_ERROR = "else self.distance(velocity, sample.x1 - sample.x0)"
HUBER = "huber = PseudoHuber(self.scale)(velocity, sample.x1 - sample.x0)"
GUESS = "guess = sample.xt - broadcast_time(sample.t, sample.xt) * velocity"
SEEN = "perceptual = distance_by(self.net, pictures_of(student, guess), wanted)"
WANTED = "wanted = pictures_of(student, sample.x0)"
END = "arrival = student(sample.x1, one, torch.zeros_like(one), sample.cond)"
END_SEEN = "seen = self.perceptual(pictures_of(student, arrival), wanted)"
END_SUM = "value = self.squared * error + (1 - self.squared) * seen"
END_EARLY = "if self.perceptual is None or step < self.perceptual_after_steps:"
END_ERROR = "error = Squared()(arrival, sample.x0)"
BOTH_TERMS = "return (1 - sample.t) * huber + weight * perceptual"
PAIR_WEIGHT = 'weight = 1.0 if self.weight == "one" else 1 / sample.t.clamp(min=EDGE)'

PATH_TANGENT = "(velocity.to(x.dtype), torch.ones_like(t))"
MF_TARGET = "target = v - broadcast_time(t - s, x) * rate"
MF_TEACHER = "v = sample.vt if teacher is None else teacher.velocity(x, t, cond)"
MF_TANGENT = 'direction = v if self.tangent == "target" else without_graph(student, x, t, t, cond)'
MF_MIXED = "mixed = self.omega * v + self.kappa * given + (1 - self.omega - self.kappa) * dropped"
MF_INSIDE = 'inside = (t >= self.guided[0]) & (t <= self.guided[1]) & (cond["class"] >= 0)'
MF_SWAPPED = MF_MIXED.replace("* given", "* other").replace("* dropped", "* given").replace("* other", "* dropped")
MF_DERIVE = "derive, student, sample, direction, needed"
ALPHA_Y = "y = (x[:rows] - broadcast_time(length, x[:rows]) * v[:rows])"
ALPHA_LENGTH = "length, at = alpha * (t - s)[:rows], t[:rows] - alpha * (t - s)[:rows]"
ALPHA_THERE = "jumped = without_graph(student, y, at, s[:rows] if last else at - stride, cond)"
ALPHA_RATE = "rate = broadcast_time((1 - alpha) / length, there) * (mean_velocity[:rows].detach() - there)"
ALPHA_JUMP = "y = (y - broadcast_time(stride, y) * jumped)"
RCGM_ALPHA = "alpha = (self.interval / (t - s)[:rows]).clamp(max=1)"
RCGM_LIMITED = "return own - (own - target).clamp(-self.clamp, self.clamp)"
PI_TARGET = "target = teacher.velocity(y, (at * t).to(t.dtype), cond)"
PI_ERROR = "predicted - moved) / broadcast_time(at.to(t.dtype), predicted))"
POLICY_RISING = "rising = x.square() / (1 + x) - falling + (start - first) / start * x / (1 + x)"
POLICY_STATE = "return (x - broadcast_time(t, x) * moved)"
TWIN_REAL = "real = network.mean_velocity(x, t, t, cond) if"
TWIN_TAUGHT = "teacher.velocity(x, t, cond)"
TWIN_FAKE = "fake = network.mean_velocity(x, t, t + 1, cond)"
TWIN_ERROR = "error = Squared()(fake, sample.vt.detach()).mean()"
TWIN_MOVED = "descend(sample, real, fake.detach()"
ALPHA_OF = "alpha = 1 / (1 + math.exp(self.gamma * (done - 0.5)))"
ALPHA_CLAMP = "return alpha if self.clamp <= alpha <= 1 - self.clamp else float(alpha > 0.5)"
FACM_G = "g = own - v + broadcast_time(t - s, x) * rate"
FACM_RELAXED = "relaxed = broadcast_time(1 - (1 - t) ** self.power, x) * g.clamp(-self.clamp, self.clamp)"
FACM_TERM = "consistency = torch.sin(t * math.pi / 2) * self.distance(mean_velocity, own - relaxed)"
FACM_ANCHOR = "anchor = self._anchor(student.mean_velocity(x, t, t, cond), v)"
FACM_COSINE = "return error + self.cosine * (1 - cosine).reshape(len(error), -1).mean(1)"
FACM_V = "v = (sample.vt if teacher is None else teacher.velocity(x, t, cond)).detach()"
CT_WHOLE = "whole = broadcast_time(1 - t, x) * (pull + broadcast_time(t, x) * rate)"
CT_G = "g = -broadcast_time(radius, x) * ((1 - r) * broadcast_time(cos2, x) * pull + r * whole)"
CT_RIDE = "eulerian_derivative(student, x, t, torch.zeros_like(t), v, cond"
CT_NETWORK = "network = broadcast_time(radius / self.sigma_data, x) * mean_velocity"
SELF_TARGET = "target = sample.vt if teacher is None else teacher.velocity(sample.xt, sample.t, sample.cond)"
SELF_SIDES = "return student.mean_velocity(sample.xt, sample.t, sample.s, sample.cond), target.detach()"
ESD_OWN = "own = without_graph(student, x, t, t, cond)"
ESD_SUM = "return mean_velocity + length * (rate + space_rate), own"
ESD_PLAIN = "return mean_velocity + length * rate, own"
LSD_SUM = "return mean_velocity - length * rate, own"
LSD_OWN = "own = without_graph(student, arrival, s, s, cond)"
LSD_ARRIVAL = "arrival = (x - length * mean_velocity.detach())"
PSD_SUM = "return mean_velocity, broadcast_time(h, x) * first + broadcast_time(1 - h, x) * second"
PSD_BETWEEN = "between = (x + broadcast_time(middle - t, x) * first)"
LEDI_NLL = "return ((x - mean).square() * (-logvar).exp() + logvar).flatten(1).mean(1) / 2"
LEDI_KL = "return (mean.square() + logvar.exp() - 1 - logvar) / 2"
LEDI_CODE = "mean + (logvar / 2).exp() * noise"
LEDI_VALUE = "value = found.mean() + weight * units.clamp(min=self.free_bits).sum() / entries"
LEDI_NORMAL = "return weight / (weight.mean()"
FM_ROOT = "root = self.weight(sample.variance).sqrt()"
FM_WEIGHTED = "velocity, target = root * velocity, root * target"
SHORT_FIRST = "without_graph(student, x, t, torch.where(shortest, t, middle), cond)"
SHORT_SECOND = "without_graph(student, between, middle, torch.where(shortest, middle, s), cond)"
FREE_TARGET = "target = teacher.velocity(arrival, s, cond) + length * rate"
FREE_RIDE = "lagrangian_derivative(student, x, torch.ones_like(s), s, cond"
CM_Y = "y = x + broadcast_time(u - t, x) * self._slope(teacher, sample, u)"
CM_TARGET = "target = y - broadcast_time(u, x) * without_graph(student, y, u, zero, cond)"
CM_SECOND = "teacher.velocity((x + broadcast_time(u - t, x) * first).to(x.dtype), u, cond)"
CHOSEN = "chosen, lagrangian = evenly(place, self.lagrangian, turned=1)"
OWN_JUMP = "jump = without_graph(student, part.x1, torch.ones_like(part.t), part.t, part.cond)"
OWN_LAGRANGIAN = "evenly(lagrangian, self.own_lagrangian, turned=2)"
OWN_STATE = "(part.x1 + broadcast_time(part.t - 1, part.x1) * jump)"
MID_STATES = "x, y, t, s = trajectory[i, leader], trajectory[j, leader], times[i], times[j]"
MID_TARGET = "target = (x - y) / broadcast_time(t - s, x).to(x.dtype)"
MID_ASK = "student.mean_velocity(x, t, s, cond)"

MUTANTS = [
    Mutant("flow_matching", "flipped sign of the teacher", FM, ASK_TEACHER, f"-{ASK_TEACHER}"),
    Mutant("flow_matching", "flipped sign of vt", FM, "target = sample.vt", "target = -sample.vt"),
    Mutant(
        "flow_matching",
        "student asked at s",
        FM,
        ASK_STUDENT,
        ASK_STUDENT.replace("sample.t, sample.t", "sample.t, sample.s"),
    ),
    Mutant("flow_matching", "teacher asked at s", FM, ASK_TEACHER, ASK_TEACHER.replace("sample.t", "sample.s")),
    Mutant("flow_matching", "teacher asked at the data", FM, ASK_TEACHER, ASK_TEACHER.replace("xt", "x0")),
    Mutant("flow_matching", "teacher's condition lost", FM, ASK_TEACHER, ASK_TEACHER.replace("sample.cond", "None")),
    Mutant("flow_matching", "student's condition lost", FM, ASK_STUDENT, ASK_STUDENT.replace("sample.cond", "None")),
    Mutant(
        "flow_matching",
        "vt in place of the teacher",
        FM,
        "sample.vt if teacher is None",
        "sample.vt if teacher is not False",
    ),
    Mutant(
        "flow_matching",
        "stop-gradient on the student",
        FM,
        "self.distance(velocity, ",
        "self.distance(velocity.detach() + 0 * velocity, ",
    ),
    Mutant("flow_matching", "ascent", FM, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("flow_matching", "sum over the batch", FM, "Loss(error.mean(),", "Loss(error.sum(),"),
    Mutant(
        "rectified",
        "student asked at s",
        RECTIFIED,
        ASK_STUDENT,
        ASK_STUDENT.replace("sample.t, sample.t", "sample.t, sample.s"),
    ),
    Mutant(
        "rectified",
        "student asked from s",
        RECTIFIED,
        ASK_STUDENT,
        ASK_STUDENT.replace("sample.t, sample.t", "sample.s, sample.s"),
    ),
    Mutant("rectified", "student asked at the data", RECTIFIED, ASK_STUDENT, ASK_STUDENT.replace("xt", "x0")),
    Mutant("rectified", "condition lost", RECTIFIED, ASK_STUDENT, ASK_STUDENT.replace("sample.cond", "None")),
    Mutant("rectified", "flipped sign of the velocity", RECTIFIED, ASK_STUDENT, f"-{ASK_STUDENT}"),
    Mutant("rectified", "pair swapped", RECTIFIED, PAIR_ERROR, PAIR_ERROR.replace("x1 - sample.x0", "x0 - sample.x1")),
    Mutant("rectified", "noise as the target", RECTIFIED, PAIR_ERROR, PAIR_ERROR.replace(" - sample.x0", "")),
    Mutant(
        "rectified", "from the point, not the data", RECTIFIED, PAIR_ERROR, PAIR_ERROR.replace("sample.x0", "sample.xt")
    ),
    Mutant(
        "rectified",
        "teacher asked",
        RECTIFIED,
        PAIR_ERROR,
        "else self.distance(velocity, teacher.velocity(sample.xt, sample.t, sample.cond))",
    ),
    Mutant("rectified", "ascent", RECTIFIED, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("rectified", "sum over the batch", RECTIFIED, "Loss(error.mean(),", "Loss(error.sum(),"),
    Mutant("rectified", "huber: pair swapped", RECTIFIED, HUBER, HUBER.replace("x1 - sample.x0", "x0 - sample.x1")),
    Mutant("rectified", "huber: noise as the target", RECTIFIED, HUBER, HUBER.replace(" - sample.x0", "")),
    Mutant("rectified", "huber: its scale ignored", RECTIFIED, HUBER, HUBER.replace("self.scale", "")),
    Mutant(
        "rectified", "guess: flipped sign", RECTIFIED, GUESS, GUESS.replace(" - broadcast_time", " + broadcast_time")
    ),
    Mutant(
        "rectified",
        "guess: the other time",
        RECTIFIED,
        GUESS,
        GUESS.replace("broadcast_time(sample.t", "broadcast_time(1 - sample.t"),
    ),
    Mutant(
        "rectified",
        "guess: arrival time",
        RECTIFIED,
        GUESS,
        GUESS.replace("broadcast_time(sample.t", "broadcast_time(sample.s"),
    ),
    Mutant(
        "rectified",
        "guess: time missing",
        RECTIFIED,
        GUESS,
        GUESS.replace("broadcast_time(sample.t, sample.xt) * ", ""),
    ),
    Mutant(
        "rectified", "guess: from the noise", RECTIFIED, GUESS, GUESS.replace("guess = sample.xt", "guess = sample.x1")
    ),
    Mutant("rectified", "seen beside the noise", RECTIFIED, WANTED, WANTED.replace("x0", "x1")),
    Mutant(
        "rectified",
        "seen the wrong way round",
        RECTIFIED,
        SEEN,
        SEEN.replace("pictures_of(student, guess), wanted", "wanted, pictures_of(student, guess)"),
    ),
    Mutant("rectified", "seen without a gradient", RECTIFIED, SEEN, SEEN.replace("guess)", "guess.detach())")),
    Mutant("rectified", "guess not decoded", RECTIFIED, SEEN, SEEN.replace("pictures_of(student, guess)", "guess")),
    Mutant("rectified", "data not decoded", RECTIFIED, WANTED, "wanted = sample.x0"),
    Mutant(
        "rectified", "weights swapped in time", RECTIFIED, BOTH_TERMS, BOTH_TERMS.replace("(1 - sample.t)", "sample.t")
    ),
    Mutant("rectified", "weight of huber missing", RECTIFIED, BOTH_TERMS, BOTH_TERMS.replace("(1 - sample.t) * ", "")),
    Mutant("rectified", "huber missing", RECTIFIED, BOTH_TERMS, "return weight * perceptual"),
    Mutant("rectified", "perceptual missing", RECTIFIED, BOTH_TERMS, "return (1 - sample.t) * huber"),
    Mutant("rectified", "weight of perceptual missing", RECTIFIED, BOTH_TERMS, BOTH_TERMS.replace("weight * ", "")),
    Mutant("rectified", "t in place of 1 / t", RECTIFIED, PAIR_WEIGHT, PAIR_WEIGHT.replace("1 / sample", "sample")),
    Mutant("rectified", "the other weight", RECTIFIED, PAIR_WEIGHT, PAIR_WEIGHT.replace("==", "!=")),
    Mutant("rectified", "1 / t without an end", RECTIFIED, PAIR_WEIGHT, PAIR_WEIGHT.replace(".clamp(min=EDGE)", "")),
    Mutant("rectified", "not resized", PERCEPTUAL, "SIZE = 224", "SIZE = 8"),
    Mutant("endpoint", "from the point", INSTA, END, END.replace("sample.x1", "sample.xt")),
    Mutant("endpoint", "from the sample's time", INSTA, END, END.replace("one, torch", "sample.t, torch")),
    Mutant("endpoint", "to the sample's time", INSTA, END, END.replace("torch.zeros_like(one)", "sample.s")),
    Mutant("endpoint", "condition lost", INSTA, END, END.replace("sample.cond", "None")),
    Mutant(
        "endpoint",
        "mean velocity in place of the arrival",
        INSTA,
        END,
        END.replace("student(", "student.mean_velocity("),
    ),
    Mutant("endpoint", "noise as the target", INSTA, END_ERROR, END_ERROR.replace("x0", "x1")),
    Mutant(
        "endpoint", "squared without a gradient", INSTA, END_ERROR, END_ERROR.replace("arrival,", "arrival.detach(),")
    ),
    Mutant("endpoint", "seen without a gradient", INSTA, END_SEEN, END_SEEN.replace("arrival)", "arrival.detach())")),
    Mutant(
        "endpoint",
        "seen the wrong way round",
        INSTA,
        END_SEEN,
        "seen = self.perceptual(wanted, pictures_of(student, arrival))",
    ),
    Mutant(
        "endpoint", "arrival not decoded", INSTA, END_SEEN, END_SEEN.replace("pictures_of(student, arrival)", "arrival")
    ),
    Mutant("endpoint", "data not decoded", INSTA, WANTED, "wanted = sample.x0"),
    Mutant("endpoint", "noise is what is wanted", INSTA, WANTED, WANTED.replace("x0", "x1")),
    Mutant("endpoint", "shares exchanged", INSTA, END_SUM, "value = (1 - self.squared) * error + self.squared * seen"),
    Mutant("endpoint", "squared share missing", INSTA, END_SUM, "value = (1 - self.squared) * seen"),
    Mutant("endpoint", "perceptual at full weight", INSTA, END_SUM, "value = self.squared * error + seen"),
    Mutant("endpoint", "one step late", INSTA, END_EARLY, END_EARLY.replace("step <", "step <=")),
    Mutant("endpoint", "first as pictures", INSTA, END_EARLY, END_EARLY.replace("step <", "step >=")),
    Mutant("endpoint", "ascent", INSTA, "return Loss(value.mean(),", "return Loss(-value.mean(),"),
    Mutant("endpoint", "squared ascent", INSTA, "return Loss(error.mean(),", "return Loss(-error.mean(),"),
    Mutant("endpoint", "sum over the batch", INSTA, "return Loss(value.mean(),", "return Loss(value.sum(),"),
    Mutant(
        "endpoint",
        "the wrong way round, by the network",
        INSTA,
        "return distance_by(self.net, a, b)",
        "return distance_by(self.net, b, a)",
    ),
    Mutant("ayf_emd", "flipped sign of the derivative", AYF, EMD_G, EMD_G.replace("+ r", "- r")),
    Mutant(
        "ayf_emd", "flipped sign of the residual", AYF, EMD_G, EMD_G.replace("g = (", "g = -(").replace("+ r", "- r")
    ),
    Mutant("ayf_emd", "flipped sign of the velocity", AYF, EMD_G, EMD_G.replace("- v", "+ v")),
    Mutant("ayf_emd", "(t - s) missing", AYF, EMD_G, EMD_G.replace("broadcast_time(t - s, x) * ", "")),
    Mutant("ayf_emd", "(t - s) turned round", AYF, EMD_G, EMD_G.replace("t - s", "s - t")),
    Mutant("ayf_emd", "t in place of (t - s)", AYF, EMD_G, EMD_G.replace("t - s", "t")),
    Mutant("ayf_emd", "warm-up weight missing", AYF, EMD_G, EMD_G.replace("r * ", "")),
    Mutant(
        "ayf_emd",
        "warm-up weight on all of it",
        AYF,
        EMD_G,
        EMD_G.replace("g = (", "g = r * (").replace("+ r *", "+ r *"),
    ),
    Mutant("ayf_emd", "teacher asked at s", AYF, EMD_TEACHER, EMD_TEACHER.replace("velocity(x, t,", "velocity(x, s,")),
    Mutant(
        "ayf_emd",
        "teacher asked at the noise",
        AYF,
        EMD_TEACHER,
        EMD_TEACHER.replace("velocity(x,", "velocity(sample.x1,"),
    ),
    Mutant("ayf_emd", "teacher's condition lost", AYF, EMD_TEACHER, EMD_TEACHER.replace("t, cond", "t, None")),
    Mutant("ayf_emd", "vt in place of the teacher", AYF, EMD_TEACHER, "v = sample.vt"),
    Mutant("ayf_emd", "flipped sign of vt", AYF, EMD_TEACHER, EMD_TEACHER.replace("v = sample.vt", "v = -sample.vt")),
    Mutant(
        "ayf_emd",
        "derivative along vt",
        AYF,
        "derive, student, sample, v, needed",
        "derive, student, sample, sample.vt, needed",
    ),
    Mutant(
        "ayf_emd",
        "zero time tangent",
        DERIVATIVE,
        "(velocity.to(x.dtype), torch.ones_like(t))",
        "(velocity.to(x.dtype), torch.zeros_like(t))",
    ),
    Mutant(
        "ayf_emd", "zero space tangent", DERIVATIVE, "(velocity.to(x.dtype), torch", "(0 * velocity.to(x.dtype), torch"
    ),
    Mutant("ayf_lmd", "flipped sign of the derivative", AYF, LMD_G, LMD_G.replace("+ r", "- r")),
    Mutant(
        "ayf_lmd",
        "flipped sign of the residual",
        AYF,
        LMD_G,
        LMD_G.replace("g = mean", "g = -mean").replace("- (t", "+ (t"),
    ),
    Mutant("ayf_lmd", "flipped sign of the velocity", AYF, LMD_G, LMD_G.replace("(teacher", "(-teacher")),
    Mutant("ayf_lmd", "(t - s) missing", AYF, LMD_G, LMD_G.replace("broadcast_time(t - s, x) * ", "")),
    Mutant("ayf_lmd", "(t - s) turned round", AYF, LMD_G, LMD_G.replace("t - s", "s - t")),
    Mutant("ayf_lmd", "warm-up weight missing", AYF, LMD_G, LMD_G.replace("r * ", "")),
    Mutant("ayf_lmd", "teacher asked at the departure", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(x, t,")),
    Mutant("ayf_lmd", "teacher asked at x, s", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(x, s,")),
    Mutant("ayf_lmd", "teacher asked at arrival, t", AYF, LMD_G, LMD_G.replace("(arrival, s,", "(arrival, t,")),
    Mutant("ayf_lmd", "teacher's condition lost", AYF, LMD_G, LMD_G.replace("s, cond", "s, None")),
    Mutant("ayf_lmd", "arrival on the other side", AYF, ARRIVAL, ARRIVAL.replace("s - t", "t - s")),
    Mutant("ayf_lmd", "graph through the teacher", AYF, ARRIVAL, ARRIVAL.replace(".detach()", "")),
    Mutant("ayf_lmd", "zero time tangent", DERIVATIVE, "(s,), (torch.ones_like(s),)", "(s,), (torch.zeros_like(s),)"),
    Mutant(
        "ayf_lmd",
        "no teacher, no refusal",
        AYF,
        'raise ValueError("objective.kind: ayf_lmd',
        'print("objective.kind: ayf_lmd',
    ),
    Mutant(
        "ayf, both",
        "warm-up turned round",
        TANGENT,
        WARM_UP,
        WARM_UP.replace("step / self.warmup_steps", "1 - step / self.warmup_steps"),
    ),
    Mutant("ayf, both", "warm-up: the larger of both", TANGENT, WARM_UP, WARM_UP.replace("min(", "max(")),
    Mutant(
        "ayf, both", "no warm-up means no derivative", TANGENT, WARM_UP, WARM_UP.replace("else self.r_max", "else 0.0")
    ),
    Mutant("ayf, both", "diagonal mask inverted", AYF, STILL, STILL.replace("~sample", "sample")),
    Mutant("ayf, both", "diagonal rows pay", AYF, STILL, STILL.replace("~sample.moving", "sample.t < sample.s")),
    Mutant("ayf, both", "weight zero pays", AYF, STILL, STILL.replace("ones(", "zeros(")),
    Mutant("ayf, both", "mixed batch out of order", AYF, BACK, "return mean_velocity, rate"),
    Mutant("ayf, both", "rates out of order", AYF, BACK, "return mean_velocity[place], rate"),
    Mutant("ayf, both", "put back the way it came", AYF, "back = torch.argsort(on_host)", "back = on_host"),
    Mutant("ayf, both", "rows with others' conditions", AYF, "{key: value[order] for", "{key: value for"),
    Mutant("ayf, both", "others' rows derived", DERIVATIVE, "tangent[:rows] for", "tangent[-rows:] for"),
    Mutant("ayf, both", "sum over the batch", AYF, "Loss(loss.mean(),", "Loss(loss.sum(),"),
    Mutant("ayf, both", "ascent", AYF, "Loss(loss.mean(),", "Loss(-loss.mean(),"),
    Mutant("ayf, both", "settings of the norm ignored", AYF, "c=self.c, norm=self.norm", "c=self.c"),
    Mutant("ayf, both", "c ignored", AYF, "c=self.c, norm=self.norm", "norm=self.norm"),
    Mutant("ayf, both", "residual not normalised", AYF, "normalise(g, c=self.c, norm=self.norm)", "g"),
    Mutant("ayf, both", "no stop-gradient", DISTANCE, TARGET, TARGET.replace(".detach()", "")),
    Mutant("ayf, both", "target on the other side", DISTANCE, TARGET, TARGET.replace(" - ", " + ")),
    Mutant(
        "ayf, both",
        "normalised across the batch",
        DISTANCE,
        "vector_norm(flat, dim=1)",
        "vector_norm(flat, dim=1).mean().expand(len(flat))",
    ),
    Mutant(
        "ayf, both",
        "dimension left out of rms",
        DISTANCE,
        "length / flat.shape[1] ** 0.5",
        "length / flat.shape[0] ** 0.5",
    ),
    Mutant("ayf_mixed", "shares exchanged", AYF, CHOSEN, CHOSEN.replace("evenly", "~evenly")),
    Mutant(
        "ayf_mixed",
        "shares of one batch alone",
        AYF,
        "self.rows(sample.places(step))",
        "self.rows(torch.arange(len(sample.t)))",
    ),
    Mutant("ayf_mixed", "parts not weighted", AYF, "loss.value * (int(rows.sum()) / len(rows))", "loss.value / 2"),
    Mutant("ayf_mixed", "settings lost", AYF, "kind(**settings)(student", "kind()(student"),
    Mutant("ayf_mixed", "own states are the path's", AYF, "sample = at_own_states(student, sample, own)", ""),
    Mutant(
        "ayf_mixed",
        "own states of the other rows",
        AYF,
        "at_own_states(student, sample, own)",
        "at_own_states(student, sample, ~own)",
    ),
    Mutant(
        "ayf_mixed",
        "own share of the Lagrangian rows",
        AYF,
        OWN_LAGRANGIAN,
        OWN_LAGRANGIAN.replace("own_lagrangian", "own_eulerian"),
    ),
    Mutant(
        "ayf_mixed",
        "own share of the Eulerian rows",
        AYF,
        "lagrangian, self.own_eulerian, t",
        "lagrangian, self.own_lagrangian, t",
    ),
    Mutant(
        "ayf_mixed",
        "own states at the arrival time",
        AYF,
        OWN_JUMP,
        OWN_JUMP.replace("part.t, part.cond", "part.s, part.cond"),
    ),
    Mutant(
        "ayf_mixed",
        "own states by the velocity alone",
        AYF,
        OWN_JUMP,
        OWN_JUMP.replace("part.t, part", "torch.ones_like(part.t), part"),
    ),
    Mutant("ayf_mixed", "own states without conditions", AYF, OWN_JUMP, OWN_JUMP.replace("part.cond", "None")),
    Mutant("ayf_mixed", "own states from the path's points", AYF, OWN_JUMP, OWN_JUMP.replace("part.x1", "part.xt")),
    Mutant("ayf_mixed", "own states on the other side", AYF, OWN_STATE, OWN_STATE.replace("part.t - 1", "1 - part.t")),
    Mutant("ayf_mixed", "own states written over the draw", AYF, "sample.xt.index_copy(", "sample.xt.index_copy_("),
    Mutant(
        "ayf_mixed",
        "own states carry grad",
        AYF,
        OWN_JUMP,
        OWN_JUMP.replace("without_graph(student, ", "student.mean_velocity("),
    ),
    Mutant(
        "ayf_mixed", "no teacher, no refusal", AYF, 'raise ValueError(f"objective.{name}', 'print(f"objective.{name}'
    ),
    Mutant("ayf_mixed", "logs out of order", AYF, "logs[key][called.places] = ", "logs[key][: len(called.places)] = "),
    Mutant("meanflow", "flipped sign of the derivative", MF, MF_TARGET, MF_TARGET.replace("v -", "v +")),
    Mutant("meanflow", "(t - s) missing", MF, MF_TARGET, MF_TARGET.replace("broadcast_time(t - s, x) * ", "")),
    Mutant("meanflow", "t in place of (t - s)", MF, MF_TARGET, MF_TARGET.replace("t - s", "t")),
    Mutant("meanflow", "flipped sign of the velocity", MF, MF_TARGET, MF_TARGET.replace("v -", "-v -")),
    Mutant("meanflow", "teacher asked at s", MF, MF_TEACHER, MF_TEACHER.replace("x, t", "x, s")),
    Mutant("meanflow", "teacher asked at the noise", MF, MF_TEACHER, MF_TEACHER.replace("(x,", "(sample.x1,")),
    Mutant("meanflow", "teacher's condition lost", MF, MF_TEACHER, MF_TEACHER.replace("cond)", "None)")),
    Mutant("meanflow", "vt in place of the teacher", MF, MF_TEACHER, "v = sample.vt"),
    Mutant("meanflow", "tangents exchanged", MF, MF_TANGENT, MF_TANGENT.replace("==", "!=")),
    Mutant("meanflow", "the student's velocity at s", MF, MF_TANGENT, MF_TANGENT.replace("x, t, t", "x, t, s")),
    Mutant("meanflow", "derivative along vt", MF, MF_DERIVE, "derive, student, sample, sample.vt, needed"),
    Mutant("meanflow", "zero time tangent", DERIVATIVE, PATH_TANGENT, PATH_TANGENT.replace("torch", "0 * torch")),
    Mutant("meanflow", "guidance turned round", MF, MF_MIXED, MF_SWAPPED),
    Mutant("meanflow", "kappa left out of the rest", MF, MF_MIXED, MF_MIXED.replace(" - self.kappa", "")),
    Mutant("meanflow", "guided without a class", MF, MF_INSIDE, MF_INSIDE.replace(' & (cond["class"] >= 0)', "")),
    Mutant("meanflow", "guided outside the interval", MF, MF_INSIDE, MF_INSIDE.replace("(t >= self.guided[0]) & ", "")),
    Mutant("meanflow", "ascent", MF, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("alpha_flow", "difference turned round", ALPHA, ALPHA_RATE, ALPHA_RATE.replace("((1 - a", "(-(1 - a")),
    Mutant("alpha_flow", "1 - alpha missing", ALPHA, ALPHA_RATE, ALPHA_RATE.replace("(1 - alpha)", "1")),
    Mutant("alpha_flow", "alpha in place of 1 - alpha", ALPHA, ALPHA_RATE, ALPHA_RATE.replace("(1 - alpha)", "alpha")),
    Mutant("alpha_flow", "step on the other side", ALPHA, ALPHA_Y, ALPHA_Y.replace("[:rows] - b", "[:rows] + b")),
    Mutant("alpha_flow", "no step", ALPHA, ALPHA_Y, ALPHA_Y.replace(" * v", " * 0 * v")),
    Mutant("alpha_flow", "1 - alpha of it", ALPHA, ALPHA_LENGTH, ALPHA_LENGTH.replace("alpha", "(1 - alpha)")),
    Mutant("alpha_flow", "alpha of t, not of t - s", ALPHA, ALPHA_LENGTH, ALPHA_LENGTH.replace("(t - s)", "t")),
    Mutant("alpha_flow", "asked again at t", ALPHA, ALPHA_THERE, ALPHA_THERE.replace("y, at,", "y, t[:rows],")),
    Mutant("alpha_flow", "asked again at x", ALPHA, ALPHA_THERE, ALPHA_THERE.replace("y, at,", "x[:rows], at,")),
    Mutant("alpha_flow", "second condition lost", ALPHA, ALPHA_THERE, ALPHA_THERE.replace("cond", "None")),
    Mutant("rcgm", "jumps on the other side", ALPHA, ALPHA_JUMP, ALPHA_JUMP.replace("y - b", "y + b")),
    Mutant("rcgm", "every jump from the first state", ALPHA, ALPHA_JUMP, "y = (y + 0 * jumped)"),
    Mutant("rcgm", "every jump to the end", ALPHA, ALPHA_THERE, ALPHA_THERE.replace(" if last else at - stride", "")),
    Mutant("rcgm", "jumps not averaged", ALPHA, "there + jumped / jumps", "there + jumped"),
    Mutant("rcgm", "every jump from the first time", ALPHA, "jumped / jumps, at - stride", "jumped / jumps, at"),
    Mutant("rcgm", "a share of the interval", RCGM, RCGM_ALPHA, RCGM_ALPHA.replace("/ (t", "* (t")),
    Mutant("rcgm", "steps beyond the arrival", RCGM, RCGM_ALPHA, RCGM_ALPHA.replace("max=1", "max=9")),
    Mutant("rcgm", "not clamped", RCGM, RCGM_LIMITED, "return target"),
    Mutant("rcgm", "clamped on one side", RCGM, RCGM_LIMITED, RCGM_LIMITED.replace("(-self", "(-9 * self")),
    Mutant("rcgm", "pushed away", RCGM, RCGM_LIMITED, RCGM_LIMITED.replace("own - (own", "own + (own")),
    Mutant("rcgm", "one jump", RCGM, "alpha, self.order)", "alpha)"),
    Mutant("twin", "its own jump for its velocity", TWIN, TWIN_REAL, TWIN_REAL.replace("t, t,", "t, 0 * t,")),
    Mutant("twin", "condition of its velocity lost", TWIN, TWIN_REAL, TWIN_REAL.replace("cond)", "None)")),
    Mutant("twin", "the teacher's time turned round", TWIN, TWIN_TAUGHT, TWIN_TAUGHT.replace("t,", "1 - t,")),
    Mutant("twin", "no twin", TWIN, TWIN_FAKE, TWIN_FAKE.replace("t + 1", "t")),
    Mutant("twin", "the twin's condition lost", TWIN, TWIN_FAKE, TWIN_FAKE.replace("cond", "None")),
    Mutant("twin", "learns the data's velocity", TWIN, TWIN_ERROR, TWIN_ERROR.replace("sample.vt.detach()", "real")),
    Mutant("twin", "its loss moves the samples", TWIN, TWIN_ERROR, TWIN_ERROR.replace(".detach()", "")),
    Mutant("twin", "velocities swapped", TWIN, TWIN_MOVED, "descend(sample, fake.detach(), real"),
    Mutant("twin", "does not learn", TWIN, "self.fake_weight * error,", "0 * error,"),
    Mutant("twin", "unlearns", TWIN, "moved.value + self", "moved.value - self"),
    Mutant("pi_flow", "teacher asked at t", PI, PI_TARGET, PI_TARGET.replace("(at * t)", "t")),
    Mutant("pi_flow", "teacher asked at x", PI, PI_TARGET, PI_TARGET.replace("(y,", "(x,")),
    Mutant("pi_flow", "teacher's condition lost", PI, PI_TARGET, PI_TARGET.replace("cond", "None")),
    Mutant(
        "pi_flow", "velocity turned round", PI, PI_ERROR, PI_ERROR.replace("predicted - moved", "moved - predicted")
    ),
    Mutant("pi_flow", "1 / tau missing", PI, PI_ERROR, "predicted - moved))"),
    Mutant("pi_flow", "gradient through the state", PI, "num_points), u.detach())", "num_points), u)"),
    Mutant("pi_flow", "all states at one time", PI, "(first + i / self.states)", "(first + 0 * i)"),
    Mutant("pi_flow", "times from s", PI, "1 - share * (1 - ratio", "ratio(s, t) + share * (1 - ratio"),
    Mutant("pi_flow", "ascent", PI, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("pi_flow", "t missing", POLICY, POLICY_STATE, "return (x - moved)"),
    Mutant("pi_flow", "state on the other side", POLICY, POLICY_STATE, POLICY_STATE.replace("x - b", "x + b")),
    Mutant("pi_flow", "parts of intervals as wholes", POLICY, POLICY_RISING, POLICY_RISING.split(" + (start")[0]),
    Mutant("pi_flow", "weights of whole intervals", POLICY, "torch.maximum(first, at[:, None])", "first"),
    Mutant("pi_flow", "weights turned round", POLICY, "[factor * falling, none]", "[factor * rising, none]"),
    Mutant("alpha_flow", "curriculum turned round", ALPHA, ALPHA_OF, ALPHA_OF.replace("done - 0.5", "0.5 - done")),
    Mutant("alpha_flow", "never MeanFlow", ALPHA, ALPHA_CLAMP, ALPHA_CLAMP.replace("float(alpha > 0.5)", "1.0")),
    Mutant("alpha_flow", "clamped at one end", ALPHA, ALPHA_CLAMP, ALPHA_CLAMP.replace(" <= 1 - self.clamp", "")),
    Mutant("alpha_flow", "no derivative before its end", MF, "self._needed(step)", "self._needed(step) and step < 0"),
    Mutant("facm", "flipped sign of the derivative", ANCHORED, FACM_G, FACM_G.replace("+ b", "- b")),
    Mutant("facm", "flipped sign of the velocity", ANCHORED, FACM_G, FACM_G.replace("- v", "+ v")),
    Mutant("facm", "(t - s) missing", ANCHORED, FACM_G, FACM_G.replace("broadcast_time(t - s, x) * ", "")),
    Mutant("facm", "relaxed at the noise", ANCHORED, FACM_RELAXED, FACM_RELAXED.replace("(1 - t) **", "t **")),
    Mutant("facm", "not relaxed", ANCHORED, FACM_RELAXED, "relaxed = g.clamp(-self.clamp, self.clamp)"),
    Mutant("facm", "not clamped", ANCHORED, FACM_RELAXED, FACM_RELAXED.replace(".clamp(-self.clamp, self.clamp)", "")),
    Mutant("facm", "clamped on one side", ANCHORED, FACM_RELAXED, FACM_RELAXED.replace("(-self.clamp", "(None")),
    Mutant("facm", "weight turned round", ANCHORED, FACM_TERM, FACM_TERM.replace("sin", "cos")),
    Mutant("facm", "weight missing", ANCHORED, FACM_TERM, FACM_TERM.replace("torch.sin(t * math.pi / 2) * ", "")),
    Mutant("facm", "target on the other side", ANCHORED, FACM_TERM, FACM_TERM.replace("own - r", "own + r")),
    Mutant("facm", "anchored at s", ANCHORED, FACM_ANCHOR, FACM_ANCHOR.replace("x, t, t", "x, t, s")),
    Mutant("facm", "anchor's condition lost", ANCHORED, FACM_ANCHOR, FACM_ANCHOR.replace("cond", "None")),
    Mutant("facm", "anchor subtracted", ANCHORED, "consistency + self.anchor", "consistency - self.anchor"),
    Mutant("facm", "anchor's weight lost", ANCHORED, "consistency + self.anchor * anchor", "consistency + anchor"),
    Mutant("facm", "cosine rewarded the other way", ANCHORED, FACM_COSINE, FACM_COSINE.replace("(1 - c", "(1 + c")),
    Mutant("facm", "cosine's weight lost", ANCHORED, FACM_COSINE, FACM_COSINE.replace("self.cosine * ", "")),
    Mutant("facm", "cosine over the width", ANCHORED, "v.to(error.dtype), dim=1", "v.to(error.dtype), dim=-1"),
    Mutant("facm", "vt in place of the teacher", ANCHORED, FACM_V, "v = sample.vt"),
    Mutant("facm", "teacher asked at s", ANCHORED, FACM_V, FACM_V.replace("x, t, c", "x, s, c")),
    Mutant("facm", "teacher's condition lost", ANCHORED, FACM_V, FACM_V.replace("cond)", "None)")),
    Mutant("facm", "derivative along vt", ANCHORED, "derive, student, sample, v", "derive, student, sample, sample.vt"),
    Mutant(
        "scm",
        "flipped sign of the derivative",
        CT,
        CT_WHOLE,
        CT_WHOLE.replace("pull + broadcast_time", "pull - broadcast_time"),
    ),
    Mutant("scm", "t missing", CT, CT_WHOLE, CT_WHOLE.replace("broadcast_time(t, x) * rate", "rate")),
    Mutant("scm", "weight 1 - t missing", CT, CT_WHOLE, CT_WHOLE.replace("broadcast_time(1 - t, x) * ", "")),
    Mutant("scm", "flipped sign of the tangent", CT, CT_G, CT_G.replace("-broadcast_time", "broadcast_time")),
    Mutant("scm", "radius missing", CT, CT_G, CT_G.replace("-broadcast_time(radius, x) * ", "-")),
    Mutant("scm", "cosine not squared", CT, "radius) ** 2", "radius)"),
    Mutant("scm", "warm-up turned round", CT, CT_G, CT_G.replace("(1 - r)", "r").replace("+ r *", "+ (1 - r) *")),
    Mutant("scm", "arrival at s", CT, CT_RIDE, CT_RIDE.replace("torch.zeros_like(t)", "sample.s")),
    Mutant("scm", "derivative along vt", CT, CT_RIDE, CT_RIDE.replace("v, cond", "sample.vt, cond")),
    Mutant("scm", "teacher asked at s", CT, "teacher.velocity(x, t, cond)", "teacher.velocity(x, sample.s, cond)"),
    Mutant("scm", "teacher's condition lost", CT, "teacher.velocity(x, t, cond)", "teacher.velocity(x, t, None)"),
    Mutant("scm", "zero time tangent", DERIVATIVE, PATH_TANGENT, PATH_TANGENT.replace("torch", "0 * torch")),
    Mutant("scm", "network not scaled", CT, CT_NETWORK, "network = mean_velocity"),
    Mutant("scm", "target on the other side", CT, "network, -normalise", "network, normalise"),
    Mutant("scm", "settings of the norm ignored", CT, "c=self.c, norm=self.norm", "c=self.c"),
    Mutant(
        "self_distilled",
        "teacher asked off the diagonal's place",
        SELF,
        SELF_TARGET,
        SELF_TARGET.replace("sample.xt", "sample.x1"),
    ),
    Mutant(
        "self_distilled", "flipped sign of vt", SELF, SELF_TARGET, SELF_TARGET.replace("= sample.vt", "= -sample.vt")
    ),
    Mutant("self_distilled", "teacher's condition lost", SELF, SELF_TARGET, SELF_TARGET.replace("sample.cond", "None")),
    Mutant("self_distilled", "no anchor", SELF, SELF_SIDES, "return target.detach(), target.detach()"),
    Mutant(
        "self_distilled",
        "no stop-gradient",
        DERIVATIVE,
        "with torch.no_grad(), torch.autocast(device",
        "with torch.autocast(device",
    ),
    Mutant("self_distilled", "ascent", SELF, "sample.s).mean(),", "sample.s).mean().neg(),"),
    Mutant("esd", "flipped sign of the derivative", SELF, ESD_SUM, ESD_SUM.replace("+ length", "- length")),
    Mutant("esd", "(t - s) missing", SELF, ESD_SUM, ESD_SUM.replace("length * ", "")),
    Mutant("esd", "zero time tangent", SELF, ESD_SUM, ESD_SUM.replace("(rate + space_rate)", "space_rate")),
    Mutant("esd", "zero space tangent", SELF, ESD_SUM, ESD_SUM.replace("(rate + space_rate)", "rate")),
    Mutant("esd", "gradient not through the rate", SELF, ESD_SUM, ESD_SUM.replace("(rate +", "(rate.detach() +")),
    Mutant("esd", "velocity asked at s", SELF, ESD_OWN, ESD_OWN.replace("x, t, t", "x, t, s")),
    Mutant("esd", "velocity asked at the noise", SELF, ESD_OWN, ESD_OWN.replace("x, t, t", "sample.x1, t, t")),
    Mutant("esd", "velocity's condition lost", SELF, ESD_OWN, ESD_OWN.replace("cond", "None")),
    Mutant("esd", "in the target: flipped sign", SELF, ESD_PLAIN, ESD_PLAIN.replace("+ length", "- length")),
    Mutant("lsd", "flipped sign of the derivative", SELF, LSD_SUM, LSD_SUM.replace("- length", "+ length")),
    Mutant("lsd", "(t - s) missing", SELF, LSD_SUM, LSD_SUM.replace("length * ", "")),
    Mutant("lsd", "zero time tangent", SELF, LSD_SUM, "return mean_velocity, own"),
    Mutant("lsd", "gradient not through the rate", SELF, LSD_SUM, LSD_SUM.replace("rate", "rate.detach()")),
    Mutant(
        "lsd",
        "torch's LayerNorm under the rate",
        DERIVATIVE,
        "sdpa_kernel(SDPBackend.MATH), LayerNormByParts()",
        "sdpa_kernel(SDPBackend.MATH)",
    ),
    Mutant("lsd", "velocity asked at the departure", SELF, LSD_OWN, LSD_OWN.replace("arrival, s, s", "x, t, t")),
    Mutant("lsd", "velocity asked at arrival, t", SELF, LSD_OWN, LSD_OWN.replace("arrival, s, s", "arrival, t, t")),
    Mutant("lsd", "velocity's condition lost", SELF, LSD_OWN, LSD_OWN.replace("cond", "None")),
    Mutant("lsd", "arrival on the other side", SELF, LSD_ARRIVAL, LSD_ARRIVAL.replace("x - length", "x + length")),
    Mutant(
        "psd",
        "shares exchanged",
        SELF,
        PSD_SUM,
        "return mean_velocity, broadcast_time(1 - h, x) * first + broadcast_time(h, x) * second",
    ),
    Mutant(
        "psd", "flipped sign of the second jump", SELF, PSD_SUM, PSD_SUM.replace("+ broadcast_time", "- broadcast_time")
    ),
    Mutant("psd", "first jump on the other side", SELF, PSD_BETWEEN, PSD_BETWEEN.replace("middle - t", "t - middle")),
    Mutant(
        "psd",
        "second jump from the departure",
        SELF,
        "second = without_graph(student, between,",
        "second = without_graph(student, x,",
    ),
    Mutant(
        "psd",
        "first jump of the velocity",
        SELF,
        "first = without_graph(student, x, t, middle,",
        "first = without_graph(student, x, t, t,",
    ),
    Mutant("psd", "splits exchanged", SELF, 'if self.split == "uniform"', 'if self.split != "uniform"'),
    Mutant("shortcut", "first jump to the end", SHORT, SHORT_FIRST, SHORT_FIRST.replace("middle)", "s)")),
    Mutant("shortcut", "second jump from the departure", SHORT, SHORT_SECOND, SHORT_SECOND.replace("between", "x")),
    Mutant(
        "shortcut",
        "second jump at the departure",
        SHORT,
        SHORT_SECOND,
        SHORT_SECOND.replace("between, middle", "between, t"),
    ),
    Mutant("shortcut", "flipped sign of the second jump", SHORT, "(first + second) / 2", "(first - second) / 2"),
    Mutant("shortcut", "not halved", SHORT, "(first + second) / 2", "(first + second)"),
    Mutant("shortcut", "(t - s) missing", SHORT, "broadcast_time(middle - t, x) * first", "first"),
    Mutant(
        "shortcut",
        "the shortest are not the velocity's",
        SHORT,
        "1 + 1e-6 if self.finest else",
        "-1 if self.finest else",
    ),
    Mutant("shortcut", "all are the velocity's", SHORT, "1 + 1e-6 if self.finest else", "1e6 if self.finest else"),
    Mutant("shortcut", "condition lost", SHORT, SHORT_SECOND, SHORT_SECOND.replace("cond", "None")),
    Mutant(
        "freeflow", "flipped sign of the derivative", FREE, FREE_TARGET, FREE_TARGET.replace("+ length", "- length")
    ),
    Mutant("freeflow", "(1 - s) missing", FREE, FREE_TARGET, FREE_TARGET.replace("length * ", "")),
    Mutant(
        "freeflow", "flipped sign of the velocity", FREE, FREE_TARGET, FREE_TARGET.replace("= teacher", "= -teacher")
    ),
    Mutant(
        "freeflow",
        "teacher asked at the departure",
        FREE,
        FREE_TARGET,
        FREE_TARGET.replace("arrival, s", "x, torch.ones_like(s)"),
    ),
    Mutant(
        "freeflow",
        "teacher asked at arrival, t",
        FREE,
        FREE_TARGET,
        FREE_TARGET.replace("arrival, s", "arrival, sample.t"),
    ),
    Mutant("freeflow", "teacher's condition lost", FREE, FREE_TARGET, FREE_TARGET.replace("cond", "None")),
    Mutant(
        "freeflow", "zero time tangent", DERIVATIVE, "(s,), (torch.ones_like(s),)", "(s,), (0 * torch.ones_like(s),)"
    ),
    Mutant("freeflow", "from a point of the data's path", FREE, "x, s, cond = sample.x1,", "x, s, cond = sample.xt,"),
    Mutant("freeflow", "departure at t", FREE, FREE_RIDE, FREE_RIDE.replace("torch.ones_like(s)", "sample.t")),
    Mutant("cmt", "flipped sign", MID, MID_TARGET, MID_TARGET.replace("x - y", "y - x")),
    Mutant("cmt", "(t - s) missing", MID, MID_TARGET, "target = x - y"),
    Mutant("cmt", "student asked at the end", MID, MID_ASK, MID_ASK.replace("x, t", "y, t")),
    Mutant("cmt", "student's times exchanged", MID, MID_ASK, MID_ASK.replace("t, s", "s, t")),
    Mutant("cmt", "student asked at the sample's times", MID, MID_ASK, MID_ASK.replace("t, s", "sample.t, sample.s")),
    Mutant("cmt", "student's own condition", MID, MID_ASK, MID_ASK.replace("cond", "sample.cond")),
    Mutant(
        "cmt",
        "ends exchanged",
        MID,
        MID_STATES,
        MID_STATES.replace("[i, leader], trajectory[j", "[j, leader], trajectory[i"),
    ),
    Mutant("cmt", "a trajectory of another row", MID, MID_STATES, MID_STATES.replace("[j, leader]", "[j, leader * 0]")),
    Mutant("cmt", "from the data", MID, "sample.x1[rows]", "sample.x0[rows]"),
    Mutant("cmt", "from the path", MID, "sample.x1[rows]", "sample.xt[rows]"),
    Mutant("cmt", "teacher's condition lost", MID, "teacher.velocity(x, t, cond)", "teacher.velocity(x, t, None)"),
    Mutant("cmt", "condition of the first rows", MID, "{key: value[rows] for", "{key: value[: len(rows)] for"),
    Mutant("cmt", "no step between", MID, "torch.maximum(nearest(s), i + 1)", "torch.maximum(nearest(s), i)"),
    Mutant("cmt", "always to the data", MID, "torch.maximum(nearest(s), i + 1)", "torch.full_like(i, len(times) - 1)"),
    Mutant("cmt", "ascent", MID, "Loss(error.mean(),", "Loss(-error.mean(),"),
    Mutant("consistency", "step on the other side", CM, CM_Y, CM_Y.replace("u - t", "t - u")),
    Mutant("consistency", "no step", CM, CM_Y, "y = x"),
    Mutant("consistency", "(t - u) missing", CM, CM_Y, CM_Y.replace("broadcast_time(u - t, x) * ", "")),
    Mutant("consistency", "target asked at t", CM, CM_TARGET, CM_TARGET.replace("y, u, zero", "y, t, zero")),
    Mutant(
        "consistency",
        "target jumps from t",
        CM,
        CM_TARGET,
        CM_TARGET.replace("broadcast_time(u, x)", "broadcast_time(t, x)"),
    ),
    Mutant(
        "consistency",
        "target on the other side",
        CM,
        CM_TARGET,
        CM_TARGET.replace("y - broadcast_time", "y + broadcast_time"),
    ),
    Mutant("consistency", "target's condition lost", CM, CM_TARGET, CM_TARGET.replace("cond", "None")),
    Mutant("consistency", "teacher asked twice at t", CM, CM_SECOND, CM_SECOND.replace("u, cond", "t, cond")),
    Mutant("consistency", "teacher asked twice at x", CM, CM_SECOND, "teacher.velocity(x, u, cond)"),
    Mutant("consistency", "solvers exchanged", CM, 'if self.solver == "euler"', 'if self.solver != "euler"'),
    Mutant("consistency", "arrival at s", CM, "self.earlier(t), torch.zeros_like(t)", "self.earlier(t), sample.s"),
    Mutant("lediflow", "variance in place of its inverse", LEDI, LEDI_NLL, LEDI_NLL.replace("(-logvar)", "logvar")),
    Mutant("lediflow", "log-variance rewarded", LEDI, LEDI_NLL, LEDI_NLL.replace("+ logvar", "- logvar")),
    Mutant("lediflow", "log-variance left out", LEDI, LEDI_NLL, LEDI_NLL.replace(" + logvar", "")),
    Mutant("lediflow", "log-variance twice", LEDI, LEDI_NLL, LEDI_NLL.replace("+ logvar", "+ 2 * logvar")),
    Mutant("lediflow", "absolute residual", LEDI, LEDI_NLL, LEDI_NLL.replace("square", "abs")),
    Mutant("lediflow", "KL without the mean", LEDI, LEDI_KL, LEDI_KL.replace("mean.square() + ", "")),
    Mutant("lediflow", "KL's log-variance flipped", LEDI, LEDI_KL, LEDI_KL.replace("1 - logvar", "1 + logvar")),
    Mutant("lediflow", "KL not halved", LEDI, LEDI_KL, LEDI_KL.replace(" / 2", "")),
    Mutant("lediflow", "code drawn with the variance", LEDI, LEDI_CODE, LEDI_CODE.replace("logvar / 2", "logvar")),
    Mutant("lediflow", "code not drawn", LEDI, LEDI_CODE, "mean + 0 * noise"),
    Mutant("lediflow", "KL rewarded", LEDI, LEDI_VALUE, LEDI_VALUE.replace("+ weight", "- weight")),
    Mutant("lediflow", "KL not shared over entries", LEDI, LEDI_VALUE, LEDI_VALUE.replace(" / entries", "")),
    Mutant("lediflow", "KL a mean over units", LEDI, LEDI_VALUE, LEDI_VALUE.replace(".sum()", ".mean()")),
    Mutant("lediflow", "free bits at most", LEDI, LEDI_VALUE, LEDI_VALUE.replace("min=", "max=")),
    Mutant(
        "lediflow", "warm-up the other way", LEDI, "step / self.warmup_steps) if", "1 - step / self.warmup_steps) if"
    ),
    Mutant("lediflow", "powers exchanged", LEDI, "power: ClassVar[float] = -1.0", "power: ClassVar[float] = 1.0"),
    Mutant("lediflow", "not normalised", LEDI, LEDI_NORMAL, "return weight / (1 if self.floor >= 0 else weight.mean()"),
    Mutant("lediflow", "floor left out", LEDI, "(variance + self.floor) **", "variance **"),
    Mutant("lediflow", "weight not rooted", FM, FM_ROOT, FM_ROOT.replace(".sqrt()", "")),
    Mutant("lediflow", "weight on the target alone", FM, FM_WEIGHTED, "velocity, target = velocity, root * target"),
    Mutant("lediflow", "weight on the student alone", FM, FM_WEIGHTED, "velocity, target = root * velocity, target"),
    Mutant("flow_matching", "no stop-gradient on the target", FM, "target = target.detach()", "target = target"),
    Mutant("consistency", "grids exchanged", CM, 'if self.grid == "uniform"', 'if self.grid != "uniform"'),
    Mutant(
        "adversarial",
        "pairing turned round",
        ADV,
        "return F.softplus(lower - higher)",
        "return F.softplus(higher - lower)",
    ),
    Mutant(
        "adversarial",
        "discriminator likes fakes",
        ADV,
        "pairing_loss(of_real, of_fake)",
        "pairing_loss(of_fake, of_real)",
    ),
    Mutant(
        "adversarial",
        "student pushed down",
        ADV,
        ADV_STUDENT,
        "return pairing_loss(of_real, scores(fake, cond, noise)).mean()",
    ),
    Mutant("adversarial", "not paired", ADV, ADV_STUDENT, "return F.softplus(-scores(fake, cond, noise)).mean()"),
    Mutant("adversarial", "condition lost", ADV, "out = scores(both, twice,", "out = scores(both, None,"),
    Mutant(
        "adversarial", "noise of the other row", ADV, "torch.cat([noise, noise])", "torch.cat([noise, noise.flip(0)])"
    ),
    Mutant("adversarial", "penalties not halved", ADV, ADV_PENALTY, ADV_PENALTY.replace(" / 2", "")),
    Mutant(
        "adversarial",
        "penalties exchanged",
        ADV,
        ADV_PENALTY,
        ADV_PENALTY.replace("r1", "r0").replace("r2", "r1").replace("r0", "r2"),
    ),
    Mutant("adversarial", "penalties subtracted", ADV, ADV_PENALTY, ADV_PENALTY.replace("value + (", "value - (")),
    Mutant("adversarial", "penalty without its graph", ADV, "create_graph=True", "retain_graph=True"),
    Mutant(
        "adversarial", "norm not squared", ADV, "gradient.flatten(1).square().sum(1)", "gradient.flatten(1).norm(dim=1)"
    ),
    Mutant(
        "adversarial",
        "mean for sum in the norm",
        ADV,
        "gradient.flatten(1).square().sum(1)",
        "gradient.flatten(1).square().mean(1)",
    ),
    Mutant(
        "adversarial",
        "fake keeps the student's graph",
        ADV,
        "torch.cat([real, fake]).detach()",
        "torch.cat([real, fake])",
    ),
    Mutant(
        "adversarial", "ratio turned round", ADV, "(above / below.clamp_min(1e-12))", "(below / above.clamp_min(1e-12))"
    ),
    Mutant(
        "adversarial",
        "sides of the factor exchanged",
        ADV,
        'if self.balance == "base"',
        'if self.balance == "adversarial"',
    ),
    Mutant(
        "adversarial",
        "weight left out",
        ADV,
        "self.weight * _ratio(of_adversarial, of_base)",
        "_ratio(of_adversarial, of_base)",
    ),
    Mutant("adversarial", "factor without bound", ADV, ".clamp(max=MOST)", ""),
    Mutant("adversarial", "starts a step late", ADV, "if step < self.start", "if step <= self.start"),
    Mutant("adversarial", "base left out before the start", ADV, "return one, 0 * one", "return 0 * one, one"),
    Mutant("adversarial", "graph of the first call", DRAWING, "self.left == 0 and", "self.left == 1 and"),
    Mutant("adversarial", "graph of every call", DRAWING, "self.left == 0 and torch", "torch"),
    Mutant(
        "adversarial",
        "base at another step",
        ADV,
        "self.base(student, teacher, sample, step)",
        "self.base(student, teacher, sample, 0)",
    ),
    Mutant("score_distillation", "flipped sign", MATCH, MATCH_G, MATCH_G.replace("real - fake", "fake - real")),
    Mutant("score_distillation", "t missing", MATCH, MATCH_G, "g = real - fake"),
    Mutant(
        "score_distillation",
        "1 - t in place of t",
        MATCH,
        MATCH_G,
        MATCH_G.replace("broadcast_time(sample.t", "broadcast_time(1 - sample.t"),
    ),
    Mutant("score_distillation", "the fake left out", MATCH, MATCH_G, "g = broadcast_time(sample.t, x) * real"),
    Mutant(
        "score_distillation",
        "fake and teacher exchanged",
        KL,
        KL_ASK,
        KL_ASK.replace("real, fake", "fake, real"),
    ),
    Mutant(
        "score_distillation",
        "teacher asked at the sample",
        KL,
        KL_ASK,
        KL_ASK.replace("velocity(x, t, c", "velocity(sample.x0, t, c"),
    ),
    Mutant(
        "score_distillation",
        "teacher asked at s",
        KL,
        KL_ASK,
        KL_ASK.replace("y(x, t, cond),", "y(x, sample.s, cond),"),
    ),
    Mutant("score_distillation", "fake asked at s", KL, KL_ASK, KL_ASK.replace("(x, t, t,", "(x, t, sample.s,")),
    Mutant(
        "score_distillation",
        "teacher's condition lost",
        KL,
        KL_ASK,
        KL_ASK.replace("cond), network", "None), network"),
    ),
    Mutant("score_distillation", "fake's condition lost", KL, KL_ASK, KL_ASK.replace("t, t, cond)", "t, t, None)")),
    Mutant(
        "score_distillation",
        "weight by the fake's distance",
        MATCH,
        MATCH_AWAY,
        MATCH_AWAY.replace("* real", "* fake"),
    ),
    Mutant(
        "score_distillation",
        "weight by the noised sample",
        MATCH,
        MATCH_AWAY,
        MATCH_AWAY.replace("sample.x0 - (x", "x - (x"),
    ),
    Mutant(
        "score_distillation",
        "guess on the other side",
        MATCH,
        MATCH_AWAY,
        MATCH_AWAY.replace("(x - broadcast_time", "(x + broadcast_time"),
    ),
    Mutant("score_distillation", "weight by the sum", MATCH, MATCH_AWAY, MATCH_AWAY.replace(".mean(1)", ".sum(1)")),
    Mutant("score_distillation", "weight by the square", MATCH, MATCH_AWAY, MATCH_AWAY.replace(".abs()", ".square()")),
    Mutant(
        "score_distillation",
        "normalised the other way round",
        MATCH,
        "if normalised else g",
        "if not normalised else g",
    ),
    Mutant(
        "score_distillation",
        "divided by nothing",
        MATCH,
        "broadcast_time(away.clamp_min(LEAST), g)",
        "broadcast_time(away, g)",
    ),
    Mutant("score_distillation", "ascent", MATCH, MATCH_LOSS, MATCH_LOSS.replace("direction.to", "-direction.to")),
    Mutant("score_distillation", "not halved", MATCH, MATCH_LOSS, MATCH_LOSS.replace("2 * x", "x")),
    Mutant(
        "score_distillation", "sum over the entries", MATCH, MATCH_LOSS, MATCH_LOSS.replace("(2 * x[0].numel())", "2")
    ),
    Mutant(
        "score_distillation",
        "the noised point descends",
        MATCH,
        MATCH_LOSS,
        MATCH_LOSS.replace("(sample.x0, d", "(sample.xt, d"),
    ),
    Mutant("score_distillation", "asked with a graph", KL, "sample.xt.detach(), sample.t", "sample.xt, sample.t"),
    Mutant(
        "score_distillation",
        "fake learns from the teacher",
        KL,
        "return FlowMatching()(fake, None,",
        "return FlowMatching()(fake, fake,",
    ),
    Mutant("joint", "lambda left out", JOINT, "return self.weight * min(1.0, rise)", "return min(1.0, rise)"),
    Mutant("joint", "no warm-up", JOINT, "return self.weight * min(1.0, rise)", "return self.weight"),
    Mutant("joint", "starts a step late", JOINT, "if step < self.start", "if step <= self.start"),
    Mutant("joint", "rises beyond lambda", JOINT, "min(1.0, rise)", "rise"),
    Mutant("joint", "warm-up from step 0", JOINT, "(step - self.start + 1)", "(step + 1)"),
    Mutant(
        "joint",
        "base at another step",
        JOINT,
        "self.base(student, teacher, sample, step)",
        "self.base(student, teacher, sample, 0)",
    ),
    Mutant(
        "joint", "the most steps alone", DRAWING, "self.steps[one_of(len(self.steps), generator)]", "self.steps[-1]"
    ),
    Mutant("joint", "always the last jump", DRAWING, "through=self.through", 'through="last"'),
    Mutant("joint", "always all jumps", DRAWING, "through=self.through", 'through="all"'),
    Mutant("joint", "the first jump's departure", JOINT, "sampler.times(steps)[-2]", "sampler.times(steps)[0]"),
    Mutant("joint", "the jump not told", MATCH, "s - (1 - self.departure)", "s"),
    Mutant("joint", "the jump told upside down", MATCH, "s - (1 - self.departure)", "s - self.departure"),
    Mutant("self_fake", "ascent", OWN, "broadcast_time(t, x) * rate", "-broadcast_time(t, x) * rate"),
    Mutant("self_fake", "no derivative", OWN, "mean + broadcast_time(t, x) * rate", "mean"),
    Mutant("self_fake", "t missing", OWN, "mean + broadcast_time(t, x) * rate", "mean + rate"),
    Mutant("self_fake", "on the diagonal", OWN, "torch.zeros_like(t)", "t"),
    Mutant("self_fake", "not along the teacher's velocity", OWN, "t), real, cond", "t), sample.vt, cond"),
    Mutant("self_fake", "condition lost", OWN, "real, cond, mode", "real, None, mode"),
    Mutant(
        "self_fake", "teacher's condition lost", OWN, "teacher.velocity(x, t, cond)", "teacher.velocity(x, t, None)"
    ),
    Mutant("self_fake", "normalised always", OWN, "normalised=self.normalised", "normalised=True"),
    Mutant("mean_velocity_match", "one velocity", MEANS, "x = x - broadcast_time(length, x) * v", "pass"),
    Mutant(
        "mean_velocity_match", "towards noise", MEANS, "x = x - broadcast_time(length", "x = x + broadcast_time(length"
    ),
    Mutant("mean_velocity_match", "always at t", MEANS, "at = t - i * length", "at = t"),
    Mutant("mean_velocity_match", "a step too late", MEANS, "t - i * length", "t - (i + 1) * length"),
    Mutant("mean_velocity_match", "the sum", MEANS, "v / self.euler_steps", "v"),
    Mutant("mean_velocity_match", "to the data", MEANS, "(t - s) / self.euler_steps", "t / self.euler_steps"),
    Mutant("mean_velocity_match", "condition lost", MEANS, "v = velocity(x, at, cond)", "v = velocity(x, at, None)"),
    Mutant("mean_velocity_match", "exchanged", MEANS, "descend(sample, mean, of_fake", "descend(sample, of_fake, mean"),
    Mutant("mean_velocity_match", "normalised always", MEANS, "normalised=self.normalised", "normalised=True"),
    Mutant("score_distillation", "the last jump alone", SCORE, "1 + one_of(num_steps, generator)", "num_steps"),
    Mutant(
        "score_distillation",
        "never the last jump",
        SCORE,
        "1 + one_of(num_steps, generator)",
        "1 + one_of(max(num_steps - 1, 1), generator)",
    ),
    Mutant(
        "score_distillation",
        "the most steps alone",
        SCORE,
        "self.drawn_steps(generator)",
        "self.steps[-1]",
    ),
    Mutant("score_distillation", "through exchanged", SCORE, 'if self.through == "all"', 'if self.through == "last"'),
    Mutant("score_distillation", "graph of every jump", SCORE, SCORE_STOP, "torch.is_grad_enabled()"),
    Mutant(
        "score_distillation", "graph of the first jump", SCORE, SCORE_STOP, SCORE_STOP.replace("self.at and", "1 and")
    ),
    Mutant("learned_weight", "weight turned round", UNSURE, "(-u).exp() * error", "u.exp() * error"),
    Mutant("learned_weight", "u subtracted", UNSURE, "(-u).exp() * error + u", "(-u).exp() * error - u"),
    Mutant("learned_weight", "u left out", UNSURE, "* error + u", "* error"),
    Mutant("learned_weight", "the error left alone", UNSURE, "(-u).exp() * error", "error"),
    Mutant(
        "learned_weight",
        "u not trained",
        UNSURE,
        "student.log_error(t, s).to(error.dtype)",
        "student.log_error(t, s).to(error.dtype).detach()",
    ),
    Mutant("learned_weight", "the error not trained", UNSURE, "(-u).exp() * error", "(-u).exp() * error.detach()"),
    Mutant("learned_weight", "times exchanged", UNSURE, "student.log_error(t, s)", "student.log_error(s, t)"),
    Mutant(
        "learned_weight",
        "sCM without it",
        CT,
        "loss = self.weight(error, student, t, torch.zeros_like(t))",
        "loss = error",
    ),
    Mutant(
        "learned_weight", "sCM at the sample's arrival", CT, "student, t, torch.zeros_like(t))", "student, t, sample.s)"
    ),
    Mutant(
        "learned_weight",
        "self-distilled without it",
        SELF,
        "self.weight(error, student, sample.t, sample.s).mean()",
        "error.mean()",
    ),
    Mutant(
        "learned_weight",
        "self-distilled on the diagonal",
        SELF,
        "student, sample.t, sample.s).mean()",
        "student, sample.t, sample.t).mean()",
    ),
    Mutant("score_distillation", "runs on to its end", SCORE, "if self.calls > self.at", "if self.calls > self.at + 9"),
]


def first_failure(mutant: Mutant | None) -> tuple[str | None, float]:
    """The first test to fail (None: all passed), and the CPU seconds it took; None as mutant: the package as it is.

    Runs in a process of its own, forked from one that has imported torch and pytest and nothing of ours.
    """
    with tempfile.TemporaryDirectory() as scratch:
        copy_of_package(Path(scratch))
        if mutant is not None:
            apply(mutant, Path(scratch))
        os.chdir(scratch)
        sys.path.insert(0, scratch)
        torch.set_num_threads(1)
        start, said, failures = time.process_time(), io.StringIO(), Failures()
        with redirect_stdout(said):
            code = pytest.main([*OPTIONS, *files_for(mutant)], plugins=[failures])
        seconds = time.process_time() - start
        tested = sys.modules["flowmap"].__file__
        os.chdir(ROOT)
    if not os.path.realpath(tested).startswith(os.path.realpath(scratch)):
        raise RuntimeError(f"not the mutated copy was tested but {tested}")
    if code not in (0, 1) or bool(code) != bool(
        failures.names
    ):  # pytest: 0 passed, 1 some failed; anything else is this script's fault
        raise RuntimeError(f"{mutant}: pytest ended with {code}\n{said.getvalue()}")
    return (failures.names[0] if failures.names else None), seconds


OPTIONS = ["-x", "-q", "--tb=short", "--assert=plain", "-p", "no:cacheprovider"]


def files_for(mutant: Mutant | None) -> list[str]:
    """The objective tests, with those of the mutated file first: they are the likeliest to fail."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "objectives").glob("test_*.py"))
    return sorted(files, key=lambda name: mutant is not None and Path(mutant.file).stem not in name)


class Failures:
    """A plugin that remembers the names of tests, and of files, that failed."""

    def __init__(self):
        self.names = []

    def pytest_runtest_logreport(self, report):
        self.names += [report.nodeid.split("::")[-1]] if report.failed else []

    def pytest_collectreport(self, report):
        self.names += [report.nodeid] if report.failed else []


def copy_of_package(folder: Path) -> None:
    """The package, recipes, the objective tests and their helpers; nothing else that a test could import instead."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("flowmap", "recipes", "teachers", "tests/objectives", "tests/support"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)


def apply(mutant: Mutant, folder: Path) -> None:
    path = folder / "flowmap" / mutant.file
    path.write_text(mutated(mutant, path.read_text()))


def mutated(mutant: Mutant, text: str) -> str:
    """The file's text with the mutation. ValueError where it has moved with the code, or changes nothing."""
    if text.count(mutant.old) != 1:
        found = f"{mutant.old!r} stands {text.count(mutant.old)} times in {mutant.file}; it must stand once"
        raise ValueError(f"{mutant.objective}, {mutant.what}: {found}")
    if mutant.old == mutant.new:
        raise ValueError(f"{mutant.objective}, {mutant.what}: it changes nothing")
    return text.replace(mutant.old, mutant.new)


def main() -> int:
    from lib.report import (  # not above: the processes read this file too, and the package must be new to them
        environment,
        table,
        write,
    )

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "objectives", nargs="*", help="only mutants of these: " + ", ".join(dict.fromkeys(m.objective for m in MUTANTS))
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time (default: one a core)")
    arguments = parser.parse_args()
    mutants = [m for m in MUTANTS if not arguments.objectives or m.objective in arguments.objectives]
    for mutant in mutants:  # a text that has moved is said at once
        mutated(mutant, (ROOT / "flowmap" / mutant.file).read_text())
    start = time.perf_counter()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "torch.func", "torch.utils.checkpoint", "pytest"])
    with processes.Pool(arguments.jobs, maxtasksperchild=1) as pool:
        failed, *results = pool.map(first_failure, [None, *mutants], chunksize=1)
    if failed[0] is not None:
        print(f"the objective tests fail without a mutation ({failed[0]}): nothing can be concluded")
        return 1
    rows = [
        [m.objective, m.what, "survived" if by is None else "killed", by or ""]
        for m, (by, _) in zip(mutants, results, strict=True)
    ]
    survivors = [row for row in rows if row[2] == "survived"]
    print(table(rows, ["objective", "mutation", "result", "first test to fail"]))
    seconds, cpu = time.perf_counter() - start, failed[1] + sum(spent for _, spent in results)
    print(
        f"{len(rows) - len(survivors)} of {len(rows)} killed in {seconds:.0f} s "
        f"({cpu:.0f} CPU seconds; the unmutated tests {failed[1]:.0f})"
    )
    if not arguments.objectives:
        write(
            "mutants",
            {
                "question": __doc__.splitlines()[0],
                "environment": environment(),
                "seconds": seconds,
                "cpu_seconds": cpu,
                "rows": rows,
            },
        )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
