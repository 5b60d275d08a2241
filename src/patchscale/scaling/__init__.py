"""What does a smaller patch buy, what does it cost, and how sure are we?"""

from patchscale.scaling.law import LawFit, fit_law, score_coarse_to_fine

__all__ = ["LawFit", "fit_law", "score_coarse_to_fine"]
