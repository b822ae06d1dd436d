from .bounds import existence_bounds as existence_bounds
from .bounds import landscape_bounds as landscape_bounds
from .generalization import generalization_bound as generalization_bound
from .perturbed_solution import solve_perturbed as solve_perturbed
from .rank_reduction import RankReduction as RankReduction
from .rank_reduction import reduce_factors as reduce_factors
from .rank_reduction import reduce_rank as reduce_rank
from .stationarity import classify as classify
