"""What forms cost in operations, counted on runs: the same in every run and on every machine, so that any change is a change of the code."""

from refimpl.complexity import Uncounted, fit
from refimpl.complexity.growth import MEASURES

from . import calls


class Counts:
    """Counts of the chapter's small sample at the longest of the fit's lengths, and how they grow with the length."""

    params = ([form for form in calls.FORMS if calls.split(form)[0].lengths], list(MEASURES))
    param_names = ("form", "measure")
    timeout = 600

    def setup_cache(self):
        """Every form is counted once, in one process."""
        found = {}
        for form in self.params[0]:
            try:
                growth = fit(*calls.split(form))
            except Uncounted:
                continue
            counts = growth.counts[min(256, max(growth.counts))]
            found[form] = {m: (getattr(counts, m), getattr(growth, m).power, getattr(growth, m).logs) for m in MEASURES}
        return found

    setup_cache.timeout = 1200

    def setup(self, found, form, measure):
        if form not in found:
            raise NotImplementedError(f"{form} uses an operation that the counter does not know")

    def track_count(self, found, form, measure):
        """Operations; the longest chain of them; bytes moved; bytes alive."""
        return found[form][measure][0]

    def track_exponent(self, found, form, measure):
        """p of T^p log^q T."""
        return found[form][measure][1]

    def track_logarithms(self, found, form, measure):
        """q of T^p log^q T."""
        return found[form][measure][2]

    track_exponent.unit = track_logarithms.unit = "power"
    track_count.unit = "operations or bytes"
