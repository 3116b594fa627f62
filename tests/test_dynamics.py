"""Statistics of loss curves on series whose truth is known: how often intervals hold, noise is called a period, a period is found. Each claim is also put to a broken version of the code."""
import numpy as np, pytest
from scipy import signal, stats
from bijdiff.training import dynamics as D
from bijdiff.training.dynamics import area_under_curve, compare_runs, epochs_to_target, fit_trend, oscillation
from bijdiff.training.dynamics import oscillation_windows, plot_runs, plot_spectrum, plot_trend, seed_interval

TRUE = 2.,3.,80.
def trend(n, a=2., b=3., tau=80.): return a+b*np.exp(-np.arange(n)/tau)

def ar1(g, n, phi):
    "AR(1) noise of variance 1, by its recursion after a start that is forgotten"
    e = g.standard_normal(n+200)*np.sqrt(1-phi**2)
    for i in range(1, len(e)): e[i] += phi*e[i-1]
    return e[200:]

NOISE = {'phi0':lambda g,n: g.standard_normal(n), 'phi.3':lambda g,n: ar1(g, n, .3), 'phi.8':lambda g,n: ar1(g, n, .8), 'heavy':lambda g,n: np.exp(.8*g.standard_normal(n))}

def called(noise, k, n=200, base=None, seed=0):
    "Share of k series of trend and noise in which a period is found at the 5% level"
    g,base = np.random.default_rng(seed),trend(n, tau=n/8) if base is None else base
    return np.mean([oscillation(base+.1*noise(g, n), n_null=59, seed=i).p_value<=.05 for i in range(k)])

# The trend

def coverage(phi, k=200):
    g,res = np.random.default_rng(1),[]
    for _ in range(k):
        t = fit_trend(trend(600)+.3*ar1(g, 600, phi))
        res.append([lo<=o<=hi for o,(lo,hi) in zip(TRUE, t.interval().values())])
    return np.mean(res, 0)

@pytest.mark.parametrize('phi', [0., .5])
def test_intervals_of_the_trend_hold_the_truth(phi): assert (coverage(phi)>=.9).all()

def test_intervals_that_ignore_neighbours_do_not(monkeypatch):
    monkeypatch.setattr(D, '_long_run', lambda x, lost=0: (x.var(), len(x)))
    assert (coverage(.5, 100)<.86).all()

def test_interval_grows_with_level_and_is_infinite_without_a_drop():
    t = fit_trend(trend(600)+.1*np.random.default_rng(0).standard_normal(600))
    widths = [np.diff(t.interval(l)['tau'])[0] for l in (.5, .9, .99)]
    assert widths==sorted(widths)
    assert fit_trend(np.ones(30)).interval()['tau']==(-np.inf, np.inf)

def test_long_run_variance_of_ar1():
    g = np.random.default_rng(0)
    assert np.mean([D._long_run(ar1(g, 500, .5))[0] for _ in range(200)])==pytest.approx(3, rel=.1)

# The parts of the test for a period

def test_periodogram_is_that_of_scipy():
    x = np.random.default_rng(0).standard_normal((3, 100))
    s = D._spectrum(x, np.zeros((100, 1)), 4)
    f,p = signal.periodogram(x, window='boxcar', nfft=200, detrend=False, return_onesided=False)
    on = (f>=4/100-1e-12)&(f<.5)
    assert s.f[:-1]==pytest.approx(f[on]) and s.power[:,:-1]==pytest.approx(p[:,on])

@pytest.mark.parametrize('phi', [-.5, 0., .8, .95])
def test_whittle_finds_the_least_of_its_sum(phi):
    x = ar1(np.random.default_rng(2), 400, phi)
    f = np.arange(4, 201)/400
    power = np.abs(np.fft.rfft(x)[4:])**2/400
    lo,hi = np.array([20]),np.array([26])
    on = np.r_[0:20, 26:len(f)]
    cost = lambda p: (lambda s: np.log((power/s)[on].mean())+np.log(s)[on].mean())(D._ar1_spectrum(p, f))
    fine = np.linspace(-.98, .98, 3921)
    found,v = (o[0] for o in D._whittle(power[None], f, lo, hi))
    assert found==pytest.approx(fine[np.argmin([cost(p) for p in fine])], abs=2e-3)
    assert v==pytest.approx((power/D._ar1_spectrum(found, f))[on].mean())

def test_basis_takes_out_the_trend_however_it_moves():
    t = D.Trend(2., 3., 80., None)
    b = D._basis(t, 0, 300, 4)
    assert b.T@b==pytest.approx(np.eye(b.shape[1]), abs=1e-9)
    for o in (t(np.arange(300)), *t.jacobian(np.arange(300)).T, np.full(300, 5.)): assert o-b@(b.T@o)==pytest.approx(np.zeros(300), abs=1e-9)
    late = D._basis(D.Trend(2., 3., 5., None), 200, 300, 4)                     # where the exponential has died out
    assert np.isfinite(late).all() and late.T@late==pytest.approx(np.eye(late.shape[1]), abs=1e-9)

# Does noise pass for a period?

@pytest.fixture(scope='module')
def false_positives(): return {k:called(f, 250) for k,f in NOISE.items()}

def test_noise_is_called_a_period_in_five_percent(false_positives):
    assert .03<=np.mean(list(false_positives.values()))<=.07
    assert max(false_positives.values())<=.1

def test_without_the_memory_of_the_noise_it_would_be(monkeypatch):
    monkeypatch.setattr(D, '_whittle', lambda power, f, lo, hi: (np.zeros(len(power)), power.mean(1)))
    assert called(NOISE['phi.8'], 40)>.5

def test_without_paying_for_the_search_it_would_be(monkeypatch):
    def one_frequency(x, *args):
        s = spectrum(x, *args)
        return s if len(x)==1 else s._replace(ratio=(s.power/s.null)[:,10])
    spectrum = D._spectrum
    monkeypatch.setattr(D, '_spectrum', one_frequency)
    assert called(NOISE['phi0'], 40)>.5

def power_law(n): return 1.5+4/(1+np.arange(n)/15)**.6
def test_misfit_of_the_trend_is_no_period(): assert called(NOISE['phi0'], 60, base=power_law(200))<=.15

# Is a period found?

def swinging(period, phi, k=40):
    "k results for a sine whose rms is half of the noise's standard deviation, and its amplitude"
    g,n,size = np.random.default_rng(3),np.arange(600),.1*.5*np.sqrt(2)
    return [oscillation(trend(600)+.1*ar1(g, 600, phi)+size*np.sin(2*np.pi*n/period+g.uniform(0, 2*np.pi)), n_null=199, seed=i) for i in range(k)],size

def found(os, period): return np.mean([o.p_value<.05 and abs(o.period/period-1)<.05 for o in os])

@pytest.mark.parametrize('phi', [0., .5])
@pytest.mark.parametrize('period', [10, 40, 100])
def test_a_sine_of_half_the_noise_is_found(period, phi):
    os,size = swinging(period, phi)
    assert found(os, period)>=.95
    assert np.mean([o.swing*o.level for o in os])==pytest.approx(size, rel=.15)
    assert np.mean([o.phi for o in os])==pytest.approx(phi, abs=.03)

def test_without_detrending_it_would_be_missed(monkeypatch):
    monkeypatch.setattr(D, 'fit_trend', lambda y: D.Trend(np.mean(y), 1., 30., y-np.mean(y)))
    monkeypatch.setattr(D, '_basis', lambda t, start, stop, c: np.full((stop-start, 1), (stop-start)**-.5))
    assert found(swinging(100, 0., 15)[0], 100)<.5

def test_numbers_of_a_known_series():
    g,n = np.random.default_rng(0),np.arange(1000)
    y = trend(1000)+.1*ar1(g, 1000, .5)+.1*np.sin(2*np.pi*n/33.3)
    o = oscillation(y)
    assert o.period==pytest.approx(33.3, rel=.01) and o.swing==pytest.approx(.05, rel=.15) and o.p_value==1/500
    assert o.amplitude==pytest.approx(np.sqrt(.01+.005)/2, rel=.05) and o.level==pytest.approx(2, rel=.01) and o.phi==pytest.approx(.5, abs=.06)
    assert oscillation(y)==o and oscillation(3*y)[1:]==pytest.approx(o[1:], rel=1e-3)

def test_slower_than_min_cycles_is_trend():
    n = np.arange(600)
    y = trend(600)+.1*np.random.default_rng(0).standard_normal(600)+.05*np.sin(2*np.pi*3*n/600)
    assert oscillation(y).p_value>.05 and oscillation(y, min_cycles=2).p_value<.01

def test_windows_see_where_it_begins():
    g,n = np.random.default_rng(0),np.arange(800)
    y = trend(800)+.1*g.standard_normal(800)+.1*np.sin(2*np.pi*n/12)*(n>=400)
    parts = oscillation_windows(y)
    assert len(parts)==4 and [o.p_value<.01 for o in parts]==[False, False, True, True]
    assert [o.period for o in parts[2:]]==pytest.approx([12, 12], rel=.03)
    assert [o.level for o in parts]==pytest.approx([trend(800)[i:i+200].mean() for i in range(0, 800, 200)], rel=.02)
    assert len(oscillation_windows(y[:799], n=3))==3

# Two runs

def pair(i, difference=.05):
    g = np.random.default_rng(i)
    common = .1*g.standard_normal(500)
    return trend(500)+difference+common+.05*ar1(g, 500, .5),trend(500)+common+.05*ar1(g, 500, .5)

def test_paired_difference():
    cs = [compare_runs(*pair(i)) for i in range(150)]
    assert np.mean([c.interval[0]<=.05<=c.interval[1] for c in cs])>=.9
    assert np.mean([c.difference for c in cs])==pytest.approx(.05, abs=.004)
    assert np.mean([c.shared for c in cs])==pytest.approx(.8, abs=.03)
    apart = [compare_runs(pair(i)[0], pair(1000+i)[1]) for i in range(30)]             # other batches in the other run
    assert abs(np.mean([c.shared for c in apart]))<.1
    assert np.mean([np.diff(c.interval) for c in cs])<.8*np.mean([np.diff(c.interval) for c in apart])

def test_a_paired_interval_that_ignores_neighbours_holds_less(monkeypatch):
    monkeypatch.setattr(D, '_long_run', lambda x, lost=0: (x.var(), len(x)))
    assert np.mean([c.interval[0]<=.05<=c.interval[1] for c in (compare_runs(*pair(i)) for i in range(100))])<.86

def test_comparing_a_run_with_itself():
    a,_ = pair(0)
    c = compare_runs(a, a, last=1)
    assert (c.difference, c.interval, c.steps)==(0, (0, 0), 500) and c.shared==pytest.approx(1)

# Curves over epochs

def test_epochs_to_target_is_where_the_line_crosses():
    g = np.random.default_rng(0)
    for _ in range(50):
        y = 2+np.cumsum(g.standard_normal(12))*.2
        target = g.uniform(y.min(), y[0])
        fine = np.linspace(1, 12, 110_001)
        assert epochs_to_target(y, target)==pytest.approx(fine[(np.interp(fine, np.arange(1, 13), y)<=target).argmax()], abs=2e-4)
        assert epochs_to_target(y, y.min()-.01) is None and epochs_to_target(y, y[0])==1.
        assert area_under_curve(y)==pytest.approx(np.interp(fine, np.arange(1, 13), y).mean(), abs=1e-3)

def test_seed_interval_is_students():
    x = [2.1, 2.4, 2.2, 2.6]
    s,ci = seed_interval(x, .9),stats.ttest_1samp(x, 0).confidence_interval(.9)
    assert (s.mean-s.half, s.mean+s.half)==pytest.approx((ci.low, ci.high))

# Errors and pictures

Y = trend(100)+.1*np.random.default_rng(0).standard_normal(100)
@pytest.mark.parametrize('call,message', [
    (lambda: fit_trend(Y[:7]), 'losses has 7 values, 7 of them finite; expected at least 8'), (lambda: fit_trend([*Y, np.nan]), 'losses has 101 values, 100 of them finite'),
    (lambda: fit_trend([Y]), r'losses has shape \(1, 100\); expected one value per step'), (lambda: fit_trend(Y).interval(0), 'level is 0; expected a number between 0 and 1'),
    (lambda: oscillation(Y[:63]), 'losses has 63 values, 63 of them finite; expected at least 64'), (lambda: oscillation(Y, n_null=0), 'n_null is 0; expected at least 19'),
    (lambda: oscillation(Y, min_cycles=0), 'min_cycles is 0; expected at least 1'), (lambda: oscillation([3.]*100), 'without any noise'), (lambda: oscillation_windows(Y), 'n is 4 and min_cycles 4, with 100 losses'),
    (lambda: oscillation_windows(Y, n=0), 'n is 0'), (lambda: plot_spectrum(Y[:20]), 'losses has 20 values'),
    (lambda: compare_runs(Y, Y[:-1]), 'a has 100 values and b has 99; expected the same steps'), (lambda: compare_runs(Y, Y, last=.05), 'last is 0.05, that is 5 of 100 steps'),
    (lambda: compare_runs(Y, Y, last=20), 'last is 20, that is 2000 of 100 steps'), (lambda: compare_runs(Y, [*Y[:-1], np.inf]), 'b has 100 values, 99 of them finite'),
    (lambda: compare_runs(Y, Y, level=1), 'level is 1'), (lambda: epochs_to_target([], 1), 'curve has 0 values'), (lambda: epochs_to_target([2, None], 1), 'curve has 2 values, 1 of them finite'),
    (lambda: epochs_to_target([2, 1], np.nan), 'target is nan'), (lambda: area_under_curve([1]), 'curve has 1 values'), (lambda: seed_interval([1]), 'values has 1 values'),
    (lambda: seed_interval([1, None, 2]), 'values has 3 values, 2 of them finite'), (lambda: seed_interval([1, np.inf]), 'values has 2 values, 1 of them finite'), (lambda: seed_interval([1, 2], 95), 'level is 95')])
def test_errors_name_the_argument_and_its_value(call, message):
    with pytest.raises(ValueError, match=message): call()

def test_pictures_show_the_verdict():
    n = np.arange(600)
    noise = trend(600)+.1*np.random.default_rng(0).standard_normal(600)
    for y in (noise, noise+.1*np.sin(2*np.pi*n/25)):
        ax = plot_spectrum(y)
        power,_,line = (o.get_ydata() for o in ax.lines)
        o = oscillation(y)
        assert (power>line).any()==(o.p_value<.05) and f'{o.period:.1f} steps, p = {o.p_value:.3f}' in ax.get_title()
    assert [l.get_label() for l in plot_runs(dict(a=noise, b=noise)).lines]==['a', 'b']
    assert len(plot_trend(noise).axes)==2
    D.plt.close('all')
