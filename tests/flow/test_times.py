import pytest
import torch

from flowmap.flow.draws import RowGenerator
from flowmap.flow.times import TIMES, Consistency, Dyadic, Interval, LogitNormal, Mixture, Uniform, UShaped
from tests.support.oracle import seeded

LAWS = [
    *(Uniform(pairs) for pairs in ("diagonal", "sorted", "consistency")),
    *(LogitNormal(-0.4, 0.9, pairs) for pairs in ("diagonal", "sorted", "consistency")),
    *(UShaped(pairs=pairs) for pairs in ("diagonal", "sorted", "consistency")),
    Interval(),
    Interval(-0.6, 1.6),
    Consistency(),
    Consistency(law="uniform"),
]
each_law = pytest.mark.parametrize("law", LAWS, ids=str)


def middles(n, low=0.0, high=1.0):
    return low + (torch.arange(n, dtype=torch.float64) + 0.5) * (high - low) / n


@each_law
def test_pairs_are_ordered_float32_and_follow_the_generator(law):
    t, s = law(1000, generator=seeded(1))
    assert t.shape == s.shape == (1000,) and t.dtype == s.dtype == torch.float32
    assert (0 <= s).all() and (s <= t).all() and (t <= 1).all()
    again = law(1000, generator=seeded(1))
    assert torch.equal(t, again[0]) and torch.equal(s, again[1])
    assert not torch.equal(t, law(1000, generator=seeded(2))[0])


@each_law
def test_density_integrates_to_one_and_is_the_histogram(law):
    fine = middles(200_000)
    density = law.density(fine)
    assert abs(float(density.mean()) - 1) < 1e-4  # midpoint rule; 2e-5 of UShaped's range is cut off
    n, bins = 200_000, 20
    t, _ = law(n, generator=seeded())
    share = torch.histc(t, bins, 0, 1).double() / n
    expected = density.reshape(bins, -1).sum(1) / len(fine)
    assert ((share - expected).abs() <= 5 * (expected / n).sqrt() + 2e-5).all()  # 5 standard errors a bin


def test_pairs_field():
    assert all(torch.equal(t, s) for t, s in [LogitNormal()(7, generator=seeded())])
    assert Uniform(pairs="consistency")(7)[1].abs().sum() == 0 and Consistency()(7)[1].abs().sum() == 0
    t, s = Uniform(pairs="sorted")(100_000, generator=seeded())
    assert abs(float(t.mean()) - 2 / 3) < 0.005 and abs(float(s.mean()) - 1 / 3) < 0.005


@pytest.mark.parametrize("law", [LogitNormal(0.3, 1.2), UShaped(), Uniform()], ids=str)
def test_distribution_is_the_integral_of_density(law):
    fine = middles(100_000)
    total = torch.cumsum(law.density_of_one(fine), 0) / len(fine)
    torch.testing.assert_close(total, law.distribution(fine + 0.5 / len(fine)), rtol=0, atol=1e-4)


def test_u_shape_is_symmetric_with_cosh_2_between_ends_and_middle():
    ends, middle = UShaped(edge=0.0).density(torch.tensor([0.0, 1.0])), UShaped(edge=0.0).density(torch.tensor([0.5]))
    torch.testing.assert_close(ends / middle, torch.cosh(torch.tensor([2.0, 2.0])))
    t, _ = UShaped()(200_000, generator=seeded())
    outer = float(((t < 0.1) | (t > 0.9)).double().mean())
    assert abs(outer - 0.345) < 0.006 and float(t.min()) >= 1e-5 and float(t.max()) <= 1 - 1e-5


def test_interval_jumps_are_logit_normal_and_long_ones_rare():
    t, s = Interval()(1_000_000, generator=seeded())
    z = torch.logit((t - s).double())
    assert abs(float(z.mean()) + 0.8) < 0.005 and abs(float(z.std()) - 1) < 0.005
    assert abs(float(((t - s) > 0.9).double().mean()) - 0.0014) < 2e-4  # methods.md section 1
    # s is uniform on [0, 1 - d], whatever d is
    u = s / (1 - (t - s))
    assert abs(float(u.mean()) - 0.5) < 0.002 and abs(float((u * (t - s)).mean() - u.mean() * (t - s).mean())) < 1e-3


def test_interval_joint_density_has_the_marginal():
    law, t = Interval(), torch.tensor([0.05, 0.3, 0.7, 0.99], dtype=torch.float64)
    s = middles(50_000)[None] * t[:, None]
    marginal = law.joint_density(t[:, None].expand_as(s), s).mean(1) * t
    torch.testing.assert_close(marginal, law.density(t), rtol=1e-5, atol=0)
    assert float(law.joint_density(torch.tensor([0.3]), torch.tensor([0.4]))) == 0


@pytest.mark.parametrize("at", ["departure", "arrival"])
def test_mixture_counts_are_exact_and_the_other_rows_are_the_bases(at):
    law = Mixture(Interval(), one_step=0.1, diagonal=0.25, diagonal_at=at)
    t, s = law(40, generator=seeded(5))
    base_t, base_s = Interval()(40, generator=seeded(5))
    jumps, still = law.members(torch.arange(40))
    assert int(jumps.sum()) == 4 and int(still.sum()) == 10 and not bool((jumps & still).any())
    assert (t[jumps] == 1).all() and (s[jumps] == 0).all()
    assert torch.equal(t[still], (base_s if at == "arrival" else base_t)[still]) and torch.equal(s[still], t[still])
    rest = ~jumps & ~still
    assert torch.equal(t[rest], base_t[rest]) and torch.equal(s[rest], base_s[rest]) and (s[rest] < t[rest]).all()
    assert abs(float(law.density(middles(100_000)).mean()) - 0.9) < 1e-4


SHARED = {
    "mixture": (Mixture(Interval(), one_step=0.05, diagonal=0.2), {"one_step": 0.05, "diagonal": 0.2}),
    "both ends": (
        Mixture(Interval(), one_step=0.15, diagonal=0.2, diagonal_at="arrival"),
        {"one_step": 0.15, "diagonal": 0.2},
    ),
    "all": (Mixture(Uniform("sorted"), one_step=0.3, diagonal=0.7), {"one_step": 0.3, "diagonal": 0.7}),
    "dyadic": (Dyadic(finest=64, diagonal=0.75), {"diagonal": 0.75}),
}


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 20])
@pytest.mark.parametrize(("law", "shares"), SHARED.values(), ids=SHARED)
def test_shares_hold_to_one_sample_at_any_batch_and_at_any_step(law, shares, batch):
    """Rounded per batch, a share of 5 % of 4 rows was never trained, and one of 75 % of 2 rows was all of them."""
    parts = [
        law(batch, generator=RowGenerator("train/0", torch.arange(k * batch, (k + 1) * batch), k)) for k in range(200)
    ]
    t, s = (torch.cat([part[i] for part in parts]) for i in range(2))
    count = torch.arange(1, len(t) + 1)
    for mask, share in ((t - s == 1, shares.get("one_step")), (t == s, shares["diagonal"])):
        if share is not None:
            assert float((mask.cumsum(0) - count * share).abs().max()) < 1 + 1e-9
            assert batch < 20 or {int(part.sum()) for part in mask.split(20)} == {
                round(20 * share)
            }  # whole numbers, exactly
    whole = law(200 * batch, generator=RowGenerator("train/0", torch.arange(200 * batch)))
    torch.testing.assert_close((t, s), whole)  # torch's sigmoid has other last bits at the end of a batch


@pytest.mark.parametrize(
    "base", [Interval(), Interval(-0.6, 1.6), Uniform("sorted"), LogitNormal(-0.4, 0.9, "sorted"), UShaped()]
)
def test_arrival_density_is_that_of_the_draws(base):
    s = base(200_000, generator=seeded(6))[1]
    edges = torch.linspace(0, 1, 21)
    drawn = torch.histogram(s, edges).hist / len(s)
    points = middles(100_000)
    expected = base.arrival_density(points).reshape(20, -1).mean(1) / 20
    assert float((drawn - expected).abs().max()) < 4e-3
    law = Mixture(base, one_step=0.1, diagonal=0.25, diagonal_at="arrival")
    assert abs(float(law.density(points).mean()) - 0.9) < 1e-3


def test_dyadic_jumps_are_powers_of_two_from_multiples_of_themselves():
    law = Dyadic(finest=8, diagonal=0.25)
    t, s = law(40_000, generator=seeded(7))
    d = t - s
    moving = d > 0
    assert (0 <= s).all() and (t <= 1).all() and int(moving.sum()) == 30_000 and t.dtype == s.dtype == torch.float32
    for k in range(4):
        rows = d[moving] == 2.0**-k
        assert abs(float(rows.float().mean()) - 1 / 4) < 0.01
        assert set((t[moving][rows] * 2**k).tolist()) == set(range(1, 2**k + 1))  # every multiple, none at a half
    assert set((t[~moving] * 8).tolist()) == set(range(1, 9)) and abs(float(t[~moving].mean()) - 9 / 16) < 0.02
    assert torch.equal(t, law(40_000, generator=seeded(7))[0])


def test_mistakes_are_named():
    for make, words in [
        (lambda: Uniform(pairs="both"), "pairs is 'both'.*sorted"),
        (lambda: LogitNormal(std=0), "std: 0 must be above 0"),
        (lambda: UShaped(a=-4), "a: -4 must be above 0, at most 50"),
        (lambda: UShaped(edge=0.5), "edge: 0.5 must lie in"),
        (lambda: Consistency(law="normal"), "law is 'normal'"),
        (lambda: Dyadic(finest=6), "finest is 6.*power of two"),
        (lambda: Dyadic(diagonal=1.5), "diagonal: 1.5 must lie in"),
        (lambda: Mixture(one_step=1.5), "one_step: 1.5 must lie in"),
        (lambda: Mixture(diagonal_at="s"), "diagonal_at is 's'.*arrival"),
        (lambda: Mixture(Consistency(), diagonal_at="arrival"), "Consistency arrives at one time only"),
        (lambda: Mixture(one_step=0.7, diagonal=0.6), "at most 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            make()
    assert len(TIMES) == 7
