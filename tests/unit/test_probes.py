"""Linear probe and nearest neighbours: figures against NumPy and SciPy, and every fault named."""

import logging

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from mmpretrain.evaluation.features import UNSEEN, Labelled, accuracies
from mmpretrain.evaluation.knn import KNNTaskConfig, votes
from mmpretrain.evaluation.probe import GRADIENT_TOLERANCE, LinearProbeConfig, fit, moments

ROWS, WIDTH, CLASSES, L2 = 60, 5, 4, 0.02


def labelled(seed: int, rows: int = ROWS, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around one centre a class, of unit norm, with their classes."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    classes = draw.integers(CLASSES, size=rows)
    vectors = centres[classes] + noise * draw.normal(size=(rows, WIDTH))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), classes


def objective(flat: np.ndarray, vectors: np.ndarray, classes: np.ndarray) -> float:
    """Mean cross-entropy and penalty of weights [WIDTH + 1, CLASSES], biases last and free."""
    weights = flat.reshape(WIDTH + 1, CLASSES)
    logits = vectors @ weights[:-1] + weights[-1]
    likely = logits[np.arange(len(classes)), classes] - np.log(np.exp(logits).sum(axis=1))
    return float(-likely.mean() + L2 / 2 * (weights[:-1] ** 2).sum())


def test_the_probe_finds_the_minimum_that_scipy_finds() -> None:
    vectors, classes = labelled(0)
    found = fit(Labelled(torch.from_numpy(vectors), torch.from_numpy(classes)), CLASSES, L2, 500).numpy()
    start = np.zeros((WIDTH + 1) * CLASSES)
    best = minimize(objective, start, args=(vectors, classes), method="BFGS", options={"gtol": 1e-7})
    reference = best.x.reshape(WIDTH + 1, CLASSES)
    assert objective(found.flatten(), vectors, classes) == pytest.approx(best.fun, abs=1e-9)
    np.testing.assert_allclose(found[:-1], reference[:-1], atol=1e-4)
    np.testing.assert_allclose(found[-1] - found[-1].mean(), reference[-1] - reference[-1].mean(), atol=1e-4)


def test_the_probe_guesses_as_the_standardised_scipy_fit_does() -> None:
    (train, learned), (test, _) = labelled(0), labelled(1, rows=200)
    mean, std = train.mean(axis=0), train.std(axis=0)
    best = minimize(objective, np.zeros((WIDTH + 1) * CLASSES), args=((train - mean) / std, learned), method="BFGS")
    weights = best.x.reshape(WIDTH + 1, CLASSES)
    wanted = ((test - mean) / std @ weights[:-1] + weights[-1]).argmax(axis=1)
    probe = LinearProbeConfig(l2=L2)
    guesses = probe.guesses(
        Labelled(torch.from_numpy(train), torch.from_numpy(learned)), torch.from_numpy(test), CLASSES
    )
    assert guesses.tolist() == wanted.tolist()


def test_a_direction_without_spread_is_not_blown_up() -> None:
    vectors = torch.tensor([[1.0, 0.3], [-1.0, 0.3]])
    mean, scale = moments(vectors)
    assert mean.tolist() == pytest.approx([0.0, 0.3])
    assert scale.tolist() == pytest.approx([1.0, 1e-6])


def test_a_probe_that_stops_too_soon_says_so(caplog: pytest.LogCaptureFixture) -> None:
    vectors, classes = labelled(0)
    train = Labelled(torch.from_numpy(vectors), torch.from_numpy(classes))
    with caplog.at_level(logging.WARNING):
        fit(train, CLASSES, L2, 500)
        assert not caplog.records
        fit(train, CLASSES, L2, 1)
    assert "the linear probe stopped after 1 steps, with a derivative of" in caplog.text
    assert float(caplog.text.rpartition(" ")[2]) > GRADIENT_TOLERANCE


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (3, 0.5), (500, 0.07)])
def test_neighbours_vote_as_in_numpy(k: int, temperature: float) -> None:
    (train, learned), (test, _) = labelled(0, noise=2.0), labelled(1, rows=200, noise=2.0)
    similarities = test @ train.T
    wanted = []
    for row in similarities:
        ballots = np.zeros(CLASSES)
        for neighbour in np.argsort(-row)[:k]:
            ballots[learned[neighbour]] += np.exp(row[neighbour] / temperature)
        wanted.append(int(ballots.argmax()))
    task = KNNTaskConfig(k=k, temperature=temperature)
    train_part = Labelled(torch.from_numpy(train).float(), torch.from_numpy(learned))
    assert task.guesses(train_part, torch.from_numpy(test).float(), CLASSES).tolist() == wanted


def test_a_small_temperature_does_not_overflow() -> None:
    ballots = votes(torch.tensor([[0.9, 0.5, 0.5]]), torch.tensor([[1, 0, 0]]), 1e-4, 2)
    assert ballots.tolist() == [[pytest.approx(0.0), 1.0]]


def test_accuracy_counts_samples_and_its_mean_counts_classes() -> None:
    classes = torch.tensor([0, 0, 0, 2, 2, UNSEEN])
    guesses = torch.tensor([0, 0, 1, 2, 0, 1])
    assert accuracies(guesses, classes, 3) == pytest.approx({"top1": 3 / 6, "mean_class": (2 / 3 + 1 / 2 + 0) / 3})
