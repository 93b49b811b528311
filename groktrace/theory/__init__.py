"""Closed forms of the learning coefficient λ, and the rank that gives it for any network small enough."""

from groktrace.theory.crossing import normal_crossing_llc as normal_crossing_llc
from groktrace.theory.jacobian import JacobianRank as JacobianRank
from groktrace.theory.jacobian import jacobian_rank as jacobian_rank
from groktrace.theory.linear import deep_linear_llc as deep_linear_llc
from groktrace.theory.linear import lazy_feature_llc as lazy_feature_llc
from groktrace.theory.linear import linearised_llc as linearised_llc
from groktrace.theory.linear import reduced_rank_llc as reduced_rank_llc
from groktrace.theory.quadratic import memorisation_bracket as memorisation_bracket
from groktrace.theory.quadratic import modular_addition_llc as modular_addition_llc
from groktrace.theory.quadratic import published_modular_addition_llc as published_modular_addition_llc
from groktrace.theory.quadratic import quadratic_llc as quadratic_llc
from groktrace.theory.result import Bracket as Bracket
from groktrace.theory.result import ClosedForm as ClosedForm
