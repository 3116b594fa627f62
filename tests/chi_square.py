"""The test that counts of samples fit probabilities."""
import numpy as np
from scipy.stats import chi2

def chi_square(counts, p):
    "p-value of counts; what is impossible must not happen, rare ones count together"
    n = counts.sum()
    assert abs(p.sum()-1)<1e-6 and not counts[p<1e-13].any(), 'impossible'
    order = np.argsort(p)
    k = max(1, int((np.cumsum(p[order])*n<5).sum())+1)                                           # the rarest, until 5 of them are expected
    got,want = (np.append(o[order[k:]], o[order[:k]].sum()) for o in (counts, p*n))
    return chi2.sf(((got-want)**2/want.clip(1e-300)).sum(), len(want)-1) if len(want)>1 else 1.
