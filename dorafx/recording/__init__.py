"""Recording: the log's records of a graph, made from its plan and the result."""

from .records import Recorder
from .scripts import reproduction
from .terms import FormTerms, SiteTerms, form_terms

__all__ = ["FormTerms", "Recorder", "SiteTerms", "form_terms", "reproduction"]
