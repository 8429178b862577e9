"""Pay that is bounded by the reference's answer, and how far reward models disagree about completions."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit


def bounded(scores: NDArray[np.float64], reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """sigmoid(score - reference's score) - 1/2 (PAR, arXiv 2502.18770): by Bradley-Terry the chance that the completion
    is preferred to the reference's, less that of a draw. It lies between -1/2 and 1/2.

    A score of ln 3 above the reference's is preferred in 3 of 4 cases and is paid 1/4.
    """
    return expit(scores - reference) - 0.5


def disagreement(table: NDArray[np.float64], samples: int) -> float:
    """How far reward models disagree about completions of one prompt.

    Each member's scores less their mean over the prompt's completions, since its zero is free; their population
    standard deviation over members; the mean over all completions.

    Two members that give one prompt's two completions (0, 2) and (5, 5) are at (-1, 1) and (0, 0): deviations 1/2, 1/2.

    Args:
        table: scores [members, batch], completions of a prompt side by side.
        samples: completions of each prompt.
    """
    groups = table.reshape(len(table), -1, samples)
    deviations = (groups - groups.mean(axis=2, keepdims=True)).std(axis=0)
    return float(np.nan_to_num(deviations).mean())
