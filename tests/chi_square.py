"""The chi-square test of `bijdiff.testing`, under the name that tests of samples import it by."""
from bijdiff.testing import chi_square
