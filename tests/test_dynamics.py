"""Statistics of loss curves, on series whose truth is known.

How often do intervals hold the truth, how often is noise called a period, how often is a period found? Each
claim is also put to a broken version of the code."""
import numpy as np, pytest
from scipy import signal, stats
from bijdiff.training import dynamics as D
from bijdiff.training.dynamics import area_under_curve, compare_runs, epochs_to_target, fit_trend, oscillation
from bijdiff.training.dynamics import oscillation_windows, plot_runs, plot_spectrum, plot_trend, seed_interval
from training_helpers import rejects

TRUE = 2.,3.,80.
def trend(n, a=2., b=3., tau=80.):
    "a + b exp(-i/tau) for steps i < n"
    return a+b*np.exp(-np.arange(n)/tau)

def sine(n, period, phase=0.): return np.sin(2*np.pi*np.arange(n)/period+phase)

def ar1(g, n, phi):
    "AR(1) noise of variance 1: e_i = phi e_(i-1) + sqrt(1-phi^2) z_i, after 200 steps that are dropped"
    e = g.standard_normal(n+200)*np.sqrt(1-phi**2)
    for i in range(1, len(e)): e[i] += phi*e[i-1]
    return e[200:]

NOISE = {
    'phi0':  lambda g, n: g.standard_normal(n),
    'phi.3': lambda g, n: ar1(g, n, .3),
    'phi.8': lambda g, n: ar1(g, n, .8),
    'heavy': lambda g, n: np.exp(.8*g.standard_normal(n)),
}

def false_positive_rate(noise, k, n=200, base=None, seed=0):
    "Fraction of k series of a trend and noise in which a period is found at the 5% level"
    g = np.random.default_rng(seed)
    if base is None: base = trend(n, tau=n/8)
    p_values = [oscillation(base+.1*noise(g, n), n_null=59, seed=i).p_value for i in range(k)]
    return np.mean([p<=.05 for p in p_values])

def variance_as_if_independent(x, lost=0):
    "A long-run variance that ignores the correlation of neighbours"
    return x.var(), len(x)

# The trend

def coverage(phi, k=200):
    "Fraction of k series in which the intervals of a, b and tau hold the truth"
    g = np.random.default_rng(1)
    trends = [fit_trend(trend(600)+.3*ar1(g, 600, phi)) for _ in range(k)]
    return np.mean([[lo<=true<=hi for true,(lo,hi) in zip(TRUE, t.interval().values())] for t in trends], 0)

@pytest.mark.parametrize('phi', [0., .5])
def test_intervals_of_the_trend_hold_the_truth(phi): assert (coverage(phi)>=.9).all()

def test_intervals_that_ignore_neighbours_do_not(monkeypatch):
    monkeypatch.setattr(D, '_long_run', variance_as_if_independent)
    assert (coverage(.5, 100)<.86).all()

def test_interval_grows_with_level_and_is_infinite_without_a_drop():
    t = fit_trend(trend(600)+.1*np.random.default_rng(0).standard_normal(600))
    widths = [np.diff(t.interval(level)['tau'])[0] for level in (.5, .9, .99)]
    assert widths==sorted(widths)
    assert fit_trend(np.ones(30)).interval()['tau']==(-np.inf, np.inf)

def test_long_run_variance_of_ar1():
    g = np.random.default_rng(0)
    variances = [D._long_run(ar1(g, 500, .5))[0] for _ in range(200)]
    assert np.mean(variances)==pytest.approx(3, rel=.1)

# The parts of the test for a period

def test_periodogram_is_that_of_scipy():
    x = np.random.default_rng(0).standard_normal((3, 100))
    s = D._spectrum(x, np.zeros((100, 1)), 4)
    f,p = signal.periodogram(x, window='boxcar', nfft=200, detrend=False, return_onesided=False)
    searched = (f>=4/100-1e-12)&(f<.5)
    assert s.f[:-1]==pytest.approx(f[searched])
    assert s.power[:,:-1]==pytest.approx(p[:,searched])

def whittle_cost(phi, power, f):
    "log of the mean of I(f)/S(f), plus the mean of log S(f), for the spectrum S of AR(1) noise"
    s = D._ar1_spectrum(phi, f)
    return np.log((power/s).mean())+np.log(s).mean()

@pytest.mark.parametrize('phi', [-.5, 0., .8, .95])
def test_whittle_finds_the_least_of_its_sum(phi):
    x = ar1(np.random.default_rng(2), 400, phi)
    f = np.arange(4, 201)/400
    power = np.abs(np.fft.rfft(x)[4:])**2/400
    (found,),(variance,) = D._whittle(power[None], f, np.array([20]), np.array([26]))
    used = np.r_[0:20, 26:len(f)]
    grid = np.linspace(-.98, .98, 3921)
    best = grid[np.argmin([whittle_cost(p, power[used], f[used]) for p in grid])]
    assert found==pytest.approx(best, abs=2e-3)
    assert variance==pytest.approx((power/D._ar1_spectrum(found, f))[used].mean())

def is_orthonormal(b): return b.T@b==pytest.approx(np.eye(b.shape[1]), abs=1e-9)

def test_basis_takes_out_the_trend_however_it_moves():
    t = D.Trend(*TRUE, None)
    b,steps = D._basis(t, 0, 300, 4),np.arange(300)
    assert is_orthonormal(b)
    for v in (t(steps), *t.jacobian(steps).T, np.full(300, 5.)):
        assert v-b@(b.T@v)==pytest.approx(np.zeros(300), abs=1e-9)
    late = D._basis(D.Trend(2., 3., 5., None), 200, 300, 4)         # where the exponential has died out
    assert np.isfinite(late).all() and is_orthonormal(late)

# Is noise called a period?

@pytest.fixture(scope='module')
def false_positives(): return {k:false_positive_rate(noise, 250) for k,noise in NOISE.items()}

def test_noise_is_called_a_period_in_five_percent(false_positives):
    assert .03<=np.mean(list(false_positives.values()))<=.07
    assert max(false_positives.values())<=.1

def white_noise(power, f, lo, hi):
    "A fit of noise without memory"
    return np.zeros(len(power)), power.mean(1)
def test_without_the_memory_of_the_noise_it_would_be(monkeypatch):
    monkeypatch.setattr(D, '_whittle', white_noise)
    assert false_positive_rate(NOISE['phi.8'], 40)>.5

def test_without_paying_for_the_search_it_would_be(monkeypatch):
    spectrum = D._spectrum
    def one_frequency(x, *args):
        s = spectrum(x, *args)
        if len(x)==1: return s
        return s._replace(ratio=(s.power/s.null)[:,10])
    monkeypatch.setattr(D, '_spectrum', one_frequency)
    assert false_positive_rate(NOISE['phi0'], 40)>.5

def power_law(n): return 1.5+4/(1+np.arange(n)/15)**.6
def test_misfit_of_the_trend_is_no_period():
    assert false_positive_rate(NOISE['phi0'], 60, base=power_law(200))<=.15

# Is a period found?

SINE_AMPLITUDE = .1*.5*np.sqrt(2) # A sine whose rms is half of the noise's standard deviation, .1

def oscillations_with_sine(period, phi, k=40):
    "Results for k series of a trend, AR(1) noise and a sine of random phase"
    g,results = np.random.default_rng(3),[]
    for i in range(k):
        y = trend(600)+.1*ar1(g, 600, phi)
        y = y+SINE_AMPLITUDE*sine(600, period, g.uniform(0, 2*np.pi))
        results.append(oscillation(y, n_null=199, seed=i))
    return results

def detection_rate(results, period):
    "Fraction of the results that are significant, with a period within 5% of the true one"
    return np.mean([o.p_value<.05 and abs(o.period/period-1)<.05 for o in results])

@pytest.mark.parametrize('phi', [0., .5])
@pytest.mark.parametrize('period', [10, 40, 100])
def test_a_sine_of_half_the_noise_is_found(period, phi):
    results = oscillations_with_sine(period, phi)
    assert detection_rate(results, period)>=.95
    assert np.mean([o.swing*o.level for o in results])==pytest.approx(SINE_AMPLITUDE, rel=.15)
    assert np.mean([o.phi for o in results])==pytest.approx(phi, abs=.03)

def constant_trend(y): return D.Trend(np.mean(y), 1., 30., y-np.mean(y))
def constant_basis(t, start, stop, min_cycles): return np.full((stop-start, 1), (stop-start)**-.5)
def test_without_detrending_it_would_be_missed(monkeypatch):
    monkeypatch.setattr(D, 'fit_trend', constant_trend)
    monkeypatch.setattr(D, '_basis', constant_basis)
    assert detection_rate(oscillations_with_sine(100, 0., 15), 100)<.5

def test_numbers_of_a_known_series():
    y = trend(1000)+.1*ar1(np.random.default_rng(0), 1000, .5)+.1*sine(1000, 33.3)
    o = oscillation(y)
    assert o.period==pytest.approx(33.3, rel=.01)
    assert o.swing==pytest.approx(.05, rel=.15)
    assert o.p_value==1/500
    assert o.amplitude==pytest.approx(np.sqrt(.01+.005)/2, rel=.05)
    assert o.level==pytest.approx(2, rel=.01)
    assert o.phi==pytest.approx(.5, abs=.06)
    assert oscillation(y)==o
    assert oscillation(3*y)[1:]==pytest.approx(o[1:], rel=1e-3)

def test_slower_than_min_cycles_is_trend():
    y = trend(600)+.1*np.random.default_rng(0).standard_normal(600)+.05*sine(600, 200)
    assert oscillation(y).p_value>.05
    assert oscillation(y, min_cycles=2).p_value<.01

def test_windows_see_where_it_begins():
    begun = np.arange(800)>=400
    y = trend(800)+.1*np.random.default_rng(0).standard_normal(800)+.1*sine(800, 12)*begun
    windows = oscillation_windows(y)
    assert [o.p_value<.01 for o in windows]==[False, False, True, True]
    assert [o.period for o in windows[2:]]==pytest.approx([12, 12], rel=.03)
    levels = [trend(800)[i:i+200].mean() for i in range(0, 800, 200)]
    assert [o.level for o in windows]==pytest.approx(levels, rel=.02)
    assert len(oscillation_windows(y[:799], n=3))==3

# Two runs

DIFFERENCE = .05

def pair_of_runs(seed):
    "Two runs that differ by a constant, with noise of their own and, twice as large, in common"
    g = np.random.default_rng(seed)
    common = .1*g.standard_normal(500)
    a = trend(500)+DIFFERENCE+common+.05*ar1(g, 500, .5)
    return a, trend(500)+common+.05*ar1(g, 500, .5)

def comparisons(k): return [compare_runs(*pair_of_runs(i)) for i in range(k)]
def coverage_of_the_difference(cs): return np.mean([c.interval[0]<=DIFFERENCE<=c.interval[1] for c in cs])
def mean_width(cs): return np.mean([np.diff(c.interval) for c in cs])

def test_paired_difference():
    paired = comparisons(150)
    assert coverage_of_the_difference(paired)>=.9
    assert np.mean([c.difference for c in paired])==pytest.approx(DIFFERENCE, abs=.004)
    assert np.mean([c.shared for c in paired])==pytest.approx(.8, abs=.03)
    apart = [compare_runs(pair_of_runs(i)[0], pair_of_runs(1000+i)[1]) for i in range(30)] # different batches
    assert abs(np.mean([c.shared for c in apart]))<.1
    assert mean_width(paired)<.8*mean_width(apart)

def test_a_paired_interval_that_ignores_neighbours_holds_less(monkeypatch):
    monkeypatch.setattr(D, '_long_run', variance_as_if_independent)
    assert coverage_of_the_difference(comparisons(100))<.86

def test_comparing_a_run_with_itself():
    a,_ = pair_of_runs(0)
    c = compare_runs(a, a, last=1)
    assert (c.difference, c.interval, c.steps)==(0, (0, 0), 500)
    assert c.shared==pytest.approx(1)

# Curves over epochs

def test_epochs_to_target_is_where_the_line_crosses():
    g = np.random.default_rng(0)
    epochs,grid = np.arange(1, 13),np.linspace(1, 12, 110_001)
    for _ in range(50):
        y = 2+np.cumsum(g.standard_normal(12))*.2
        target,line = g.uniform(y.min(), y[0]),np.interp(grid, epochs, y)
        assert epochs_to_target(y, target)==pytest.approx(grid[(line<=target).argmax()], abs=2e-4)
        assert epochs_to_target(y, y.min()-.01) is None
        assert epochs_to_target(y, y[0])==1.
        assert area_under_curve(y)==pytest.approx(line.mean(), abs=1e-3)

def test_seed_interval_is_students():
    x = [2.1, 2.4, 2.2, 2.6]
    s = seed_interval(x, .9)
    t_test = stats.ttest_1samp(x, 0).confidence_interval(.9)
    assert (s.mean-s.half_width, s.mean+s.half_width)==pytest.approx((t_test.low, t_test.high))

# Errors and pictures

Y = trend(100)+.1*np.random.default_rng(0).standard_normal(100)
REJECTED = [ # argument that the error names, call
    ('losses',     lambda: fit_trend(Y[:7])),
    ('losses',     lambda: fit_trend([*Y, np.nan])),
    ('losses',     lambda: fit_trend([Y])),
    ('level',      lambda: fit_trend(Y).interval(0)),
    ('losses',     lambda: oscillation(Y[:63])),
    ('n_null',     lambda: oscillation(Y, n_null=0)),
    ('min_cycles', lambda: oscillation(Y, min_cycles=0)),
    ('losses',     lambda: oscillation([3.]*100)),
    ('n',          lambda: oscillation_windows(Y)),
    ('n',          lambda: oscillation_windows(Y, n=0)),
    ('losses',     lambda: plot_spectrum(Y[:20])),
    ('b',          lambda: compare_runs(Y, Y[:-1])),
    ('last',       lambda: compare_runs(Y, Y, last=.05)),
    ('last',       lambda: compare_runs(Y, Y, last=20)),
    ('b',          lambda: compare_runs(Y, [*Y[:-1], np.inf])),
    ('level',      lambda: compare_runs(Y, Y, level=1)),
    ('curve',      lambda: epochs_to_target([], 1)),
    ('curve',      lambda: epochs_to_target([2, None], 1)),
    ('target',     lambda: epochs_to_target([2, 1], np.nan)),
    ('curve',      lambda: area_under_curve([1])),
    ('values',     lambda: seed_interval([1])),
    ('values',     lambda: seed_interval([1, None, 2])),
    ('values',     lambda: seed_interval([1, np.inf])),
    ('level',      lambda: seed_interval([1, 2], 95)),
]
@pytest.mark.parametrize('name,call', REJECTED)
def test_errors_name_the_argument(name, call):
    with rejects(name): call()

@pytest.mark.parametrize('size', [0., .1], ids=['noise', 'period'])
def test_the_spectrum_shows_the_verdict(size):
    y = trend(600)+.1*np.random.default_rng(0).standard_normal(600)+size*sine(600, 25)
    ax,o = plot_spectrum(y),oscillation(y)
    power,_,line = (curve.get_ydata() for curve in ax.lines)
    assert (power>line).any()==(o.p_value<.05)
    assert f'{o.period:.1f} steps, p = {o.p_value:.3f}' in ax.get_title()

def test_pictures_of_runs_and_of_a_trend():
    y = trend(600)+.1*np.random.default_rng(0).standard_normal(600)
    assert [line.get_label() for line in plot_runs(dict(a=y, b=y)).lines]==['a', 'b']
    assert len(plot_trend(y).axes)==2
