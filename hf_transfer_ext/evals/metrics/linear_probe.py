from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

from hf_transfer_ext.measurement import Measurement
from hf_transfer_ext.measurement.bootstrap import mean_interval


def linear_probe(
    hidden: Float[np.ndarray, "examples hidden"],
    labels: Int[np.ndarray, " examples"],
    *,
    folds: int = 5,
    ridge: float = 1e-2,
    seed: int = 0,
) -> Measurement:
    r"""Accuracy of a linear classifier on hidden states, on examples that it was not fitted to.

    If a probe still distinguishes the forgotten answers after unlearning, the knowledge is still in the model and only
    its output is blocked. Compare with the share of the largest class, and with a retrained model.

    Args:
        hidden: Hidden states of one layer (`TokenScores.hidden[layer]`). They are standardized with the mean and
            standard deviation of the examples that a fold is fitted to.
        labels: Class of each example, from 0.
        folds: Number of folds; each is predicted by a classifier fitted to the others.
        ridge: Strength of the L2 penalty on the classifier's weights (not on its bias), > 0.

    Returns:
        Share of examples whose class is predicted correctly.

    Raises:
        ValueError: Fewer than two classes, or fewer examples than folds.

    Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes", 2016,
    https://arxiv.org/abs/1610.01644
    """
    count, classes = len(labels), len(set(labels.tolist()))
    if classes < 2 or count < folds or folds < 2:
        raise ValueError(
            f"A probe needs two classes and at least as many examples as folds (2 or more): got {classes} classes, "
            f"{count} examples, {folds} folds."
        )
    order = np.random.default_rng(seed).permutation(count)
    correct = np.zeros(count)
    for fold in range(folds):
        test = order[fold::folds]
        train = np.setdiff1d(order, test)
        mean, deviation = hidden[train].mean(0), hidden[train].std(0) + 1e-6
        weights = _fit((hidden[train] - mean) / deviation, labels[train], int(labels.max()) + 1, ridge)
        scores = np.c_[(hidden[test] - mean) / deviation, np.ones(len(test))] @ weights
        correct[test] = scores.argmax(-1) == labels[test]
    interval = mean_interval(correct, seed=seed)
    return Measurement("linear_probe", float(correct.mean()), "share of examples", False, count, interval)


def _fit(features: np.ndarray, labels: np.ndarray, classes: int, ridge: float) -> np.ndarray:
    """Multinomial logistic regression, bias in the last row; convex, so the initialization does not matter."""
    inputs = torch.tensor(np.c_[features, np.ones(len(features))], dtype=torch.float64)
    targets = torch.tensor(labels)
    weights = torch.zeros(inputs.shape[1], classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(inputs @ weights, targets) + ridge * weights[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach().numpy()
