"""What embeddings know of labels: weighted nearest neighbours and a linear probe, learnt from labelled training images.

Both give scores of all classes and report the figures of ``accuracy_outcomes``. A class without a training image can
never be the answer: test images of it count as wrong (``unseen_images`` says how many there are).
"""

import warnings
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from llip_jax.config import ConfigError
from llip_jax.evaluation.classification import accuracy_outcomes
from llip_jax.evaluation.figures import Result, figures_of
from llip_jax.evaluation.scoring import Progress

INVERSE_REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What a linear probe chooses from: scikit-learn's C."""
_ITERATIONS = 1000
_HELD_OUT = 5
"""A linear probe is chosen on one in so many training images of each class."""
_BLOCK_PAIRS = 2**22
"""Pairs of test and training images compared together: bounds the temporaries to about 100 MiB."""


def knn(
    train: Float[np.ndarray, "T d"],
    train_labels: Int[np.ndarray, "T"],
    test: Float[np.ndarray, "N d"],
    test_labels: Int[np.ndarray, "N"],
    classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
    progress: Progress = lambda _: None,
) -> Result:
    """Weighted k-NN classification as in DINO (arXiv 2104.14294, appendix F; arXiv 1805.01978, section 3.4).

    Each of the k training images of highest cosine votes for its class with weight exp(cosine / temperature). Training
    images level at the end of the list share the places left: their votes are the expectation over random orders.

    Args:
        train: embeddings of training images, of any norm.
        train_labels: their classes, in [0, classes).
        test: embeddings of the images to classify.
        test_labels: their classes.
        classes: how many there are.
        k: neighbours that vote; all training images where there are fewer.
        temperature: see above.
        progress: called with the number of test images done since the last call.

    Raises:
        ValueError: shapes disagree, a side is empty, a label is not in [0, classes), or an embedding is not finite.
    """
    seen = _check(train, train_labels, test, test_labels, classes)
    if k < 1 or temperature <= 0:
        raise ValueError(f"expected k of at least 1 and a temperature above 0, got {k} and {temperature}")
    k = min(k, len(train))
    train, test = _normalized(train), _normalized(test)
    scores = np.empty((len(test), classes), np.float32)
    step = max(1, _BLOCK_PAIRS // len(train))
    for start in range(0, len(test), step):
        cosines = test[start : start + step] @ train.T
        last = np.partition(cosines, -k, axis=1)[:, -k, None]
        above, level = cosines > last, cosines == last
        share = (k - above.sum(axis=1)) / level.sum(axis=1)
        rows, neighbours = np.nonzero(above | level)
        # Less the nearest one's, which changes no comparison and cannot overflow.
        nearness = (cosines - cosines.max(axis=1, keepdims=True))[rows, neighbours]
        votes = np.exp(nearness.astype(np.float64) / temperature)
        votes *= np.where(level[rows, neighbours], share[rows], 1.0)
        place = rows * classes + train_labels[neighbours]
        scores[start : start + step] = np.bincount(place, votes, len(cosines) * classes).reshape(-1, classes)
        progress(len(cosines))
    scores[:, ~seen] = -np.inf
    return _result(scores, test_labels, seen, {"k": k, "temperature": temperature, "training_images": len(train)})


def linear_probe(
    train: Float[np.ndarray, "T d"],
    train_labels: Int[np.ndarray, "T"],
    test: Float[np.ndarray, "N d"],
    test_labels: Int[np.ndarray, "N"],
    classes: int,
    *,
    progress: Progress = lambda _: None,
) -> Result:
    """Multinomial logistic regression by L-BFGS, as in CLIP (arXiv 2103.00020, appendix A.3), with scikit-learn.

    Embeddings are standardized, dimension by dimension, by mean and deviation of the training images, so that one
    range of regularizations serves embeddings of any norm. (CLIP takes them as they are, CLIP_benchmark scales each to
    norm 1; MAE, arXiv 2111.06377, appendix A.1, standardizes.) Of ``INVERSE_REGULARIZATIONS``, the one that is right
    most often on a fifth of the *training* images, held out class by class, is fitted again to all of them; of equally
    good ones the strongest regularization. Nothing here is drawn at random.

    Args:
        train: embeddings of training images.
        train_labels: their classes, in [0, classes), of which at least two occur.
        test: embeddings of the images to classify.
        test_labels: their classes.
        classes: how many there are.
        progress: called with 1 after each of ``len(INVERSE_REGULARIZATIONS) + 1`` fits.

    Raises:
        ConfigError: scikit-learn is missing, or all training images are of one class.
        ValueError: shapes disagree, a side is empty, a label is not in [0, classes), or an embedding is not finite.
    """
    seen = _check(train, train_labels, test, test_labels, classes)
    if seen.sum() < 2:
        raise ConfigError(f"linear probe: expected training images of two classes or more, all {len(train)} are of one")
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ConfigError("a linear probe takes scikit-learn: pip install 'llip_jax[report]'") from None

    def fit(rows: np.ndarray, c: float) -> Any:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=_ITERATIONS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported as `converged`
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # few images a class is fine
            model.fit(train[rows], train_labels[rows])
        progress(1)
        return model

    held_out = _held_out(train_labels)
    hits = []
    for c in INVERSE_REGULARIZATIONS:
        model = fit(~held_out, c)
        right = model.predict(train[held_out]) == train_labels[held_out] if held_out.any() else np.zeros(0)
        hits.append(int(np.sum(right)))
    chosen = INVERSE_REGULARIZATIONS[int(np.argmax(hits))]
    model = fit(np.ones(len(train), bool), chosen)
    decision = model.decision_function(test)
    if decision.ndim == 1:  # of two classes scikit-learn gives one number, in favour of the second
        decision = np.stack([-decision, decision], axis=1)
    scores = np.full((len(test), classes), -np.inf)
    scores[:, seen] = decision
    further = {
        "inverse_regularization": chosen,
        "converged": bool(model[-1].n_iter_.max() < _ITERATIONS),
        "training_images": len(train),
    }
    return _result(scores, test_labels, seen, further)


def _held_out(labels: Int[np.ndarray, "T"]) -> np.ndarray:
    """The second of every five images of each class: none of a class with one image, which is needed for learning."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    place = np.empty(len(labels), np.int64)
    place[order] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return place % _HELD_OUT == 1


def _result(
    scores: Float[np.ndarray, "N C"], labels: Int[np.ndarray, "N"], seen: np.ndarray, further: dict[str, Any]
) -> Result:
    outcomes = accuracy_outcomes(scores, labels)
    counts = {"classes": len(seen), "unseen_images": int(np.sum(~seen[labels]))}
    return Result(figures_of(outcomes) | further | counts, outcomes)


def _normalized(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _check(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, classes: int
) -> np.ndarray:
    """Whether each class has a training image."""
    for name, x, labels in (("training", train, train_labels), ("test", test, test_labels)):
        if x.ndim != 2 or x.size == 0 or labels.shape != x.shape[:1] or x.shape[1] != train.shape[1]:
            raise ValueError(f"{name} images: expected [n, d] and labels [n], got {x.shape} and {labels.shape}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"{name} images: labels from {labels.min()} to {labels.max()}, expected [0, {classes})")
        if not np.isfinite(x).all():
            raise ValueError(f"{name} images: an embedding is not finite")
    return np.bincount(train_labels, minlength=classes) > 0
