"""Recording: what the log says of a graph, from its plan and what came of it."""

from .records import Recorder
from .terms import FormTerms, SiteTerms, form_terms

__all__ = ["FormTerms", "Recorder", "SiteTerms", "form_terms"]
