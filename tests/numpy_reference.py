"""Float64 NumPy versions of the pair scores, losses and pair targets: what every fast version is compared with.

Written from the formulas alone, with loops over pairs, so that it shares neither code nor mistakes with llip_jax.
N images, J texts, K mixture tokens, M mixer heads of dh numbers each, d = M dh, e the joint width (e = d in Llip).
"""

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int

DuplicateRule = Literal["ignore", "positive", "negative"]


def _pair(
    q: Float[np.ndarray, "M dh"], k: Float[np.ndarray, "K M dh"], v: Float[np.ndarray, "K M dh"], temperature: float
) -> tuple[Float[np.ndarray, "K M"], Float[np.ndarray, "d"]]:
    """Mixing weights (a softmax over K for each head) and mixed values, heads concatenated, of one (image, text)."""
    weights = np.empty(k.shape[:2])
    mixed = np.empty(q.shape)
    for m in range(len(q)):
        scores = k[:, m] @ q[m] / temperature
        exponentials = np.exp(scores - scores.max())
        weights[:, m] = exponentials / exponentials.sum()
        mixed[m] = weights[:, m] @ v[:, m]
    return weights, mixed.reshape(-1)


def contextual_cosines(
    q: Float[np.ndarray, "J M dh"],
    k: Float[np.ndarray, "N K M dh"],
    v: Float[np.ndarray, "N K M dh"],
    w_out: Float[np.ndarray, "d e"],
    t: Float[np.ndarray, "J e"],
    temperature: float,
) -> Float[np.ndarray, "N J"]:
    """Cosine of image i, mixed by text j, with text j (``t`` need not be normalised)."""
    cosines = np.empty((len(k), len(q)))
    for i in range(len(k)):
        for j in range(len(q)):
            _, mixed = _pair(q[j], k[i], v[i], temperature)
            z = mixed @ w_out
            cosines[i, j] = z @ t[j] / (np.linalg.norm(z) * np.linalg.norm(t[j]))
    return cosines


def contextual_cosines_vjp(
    q: Float[np.ndarray, "J M dh"],
    k: Float[np.ndarray, "N K M dh"],
    v: Float[np.ndarray, "N K M dh"],
    w_out: Float[np.ndarray, "d e"],
    t: Float[np.ndarray, "J e"],
    temperature: float,
    cotangent: Float[np.ndarray, "N J"],
) -> tuple[
    Float[np.ndarray, "J M dh"],
    Float[np.ndarray, "N K M dh"],
    Float[np.ndarray, "N K M dh"],
    Float[np.ndarray, "d e"],
    Float[np.ndarray, "J e"],
]:
    """Gradient of ``sum(cotangent * contextual_cosines(...))`` with respect to q, k, v, w_out and t."""
    dq, dk, dv, dw_out, dt = (np.zeros(x.shape) for x in (q, k, v, w_out, t))
    for i in range(len(k)):
        for j in range(len(q)):
            weights, mixed = _pair(q[j], k[i], v[i], temperature)
            z = mixed @ w_out
            z_norm, t_norm = np.linalg.norm(z), np.linalg.norm(t[j])
            z_unit, t_unit = z / z_norm, t[j] / t_norm
            cosine = z_unit @ t_unit
            # A norm only lets through the part of the gradient at right angles to its vector.
            dz = cotangent[i, j] * (t_unit - cosine * z_unit) / z_norm
            dt[j] += cotangent[i, j] * (z_unit - cosine * t_unit) / t_norm
            dw_out += np.outer(mixed, dz)
            dmixed = (w_out @ dz).reshape(q[j].shape)
            for m in range(q.shape[1]):
                w = weights[:, m]
                dv[i, :, m] += np.outer(w, dmixed[m])
                dw = v[i, :, m] @ dmixed[m]
                dscores = w * (dw - w @ dw) / temperature
                dq[j, m] += dscores @ k[i, :, m]
                dk[i, :, m] += np.outer(dscores, q[j, m])
    return dq, dk, dv, dw_out, dt


def _log_sigmoid(x: Float[np.ndarray, "N J"]) -> Float[np.ndarray, "N J"]:
    log_sigmoid: Float[np.ndarray, "N J"] = -np.logaddexp(0.0, -x)
    return log_sigmoid


def sigmoid_loss(
    logits: Float[np.ndarray, "N J"],
    target: Float[np.ndarray, "N J"],
    weight: Float[np.ndarray, "N J"],
    mask: Float[np.ndarray, "N J"],
) -> float:
    """Weighted binary cross-entropy of all unmasked pairs: a sum over texts, a mean over images."""
    pairs = target * _log_sigmoid(logits) + (1 - target) * _log_sigmoid(-logits)
    return float(-np.sum(mask * weight * pairs) / len(logits))


def sigmoid_loss_gradient(
    logits: Float[np.ndarray, "N J"],
    target: Float[np.ndarray, "N J"],
    weight: Float[np.ndarray, "N J"],
    mask: Float[np.ndarray, "N J"],
) -> Float[np.ndarray, "N J"]:
    """Gradient of :func:`sigmoid_loss` with respect to the logits."""
    gradient: Float[np.ndarray, "N J"] = mask * weight * (np.exp(_log_sigmoid(logits)) - target) / len(logits)
    return gradient


def _softmax_direction(
    logits: Float[np.ndarray, "Q A"],
    positives: Float[np.ndarray, "Q A"],
    kept: Bool[np.ndarray, "Q A"],
    query_weight: Float[np.ndarray, "Q"],
) -> tuple[float, Float[np.ndarray, "Q A"]]:
    """Weighted mean over queries (rows) of their cross-entropy over answers (columns), and its gradient.

    A query whose ``positives`` are all zero is left out of the mean; the loss is 0 when that leaves none.
    """
    loss, total, gradient = 0.0, 0.0, np.zeros(logits.shape)
    for query in range(len(logits)):
        if positives[query].sum() == 0:
            continue
        columns = kept[query]
        s = logits[query, columns]
        p = positives[query, columns] / positives[query].sum()
        log_softmax = s - s.max() - np.log(np.sum(np.exp(s - s.max())))
        loss -= query_weight[query] * (p @ log_softmax)
        gradient[query, columns] = query_weight[query] * (np.exp(log_softmax) - p)
        total += query_weight[query]
    return (loss / total, gradient / total) if total > 0 else (0.0, gradient)


def _softmax_loss_and_gradient(
    logits: Float[np.ndarray, "N J"],
    target: Float[np.ndarray, "N J"],
    weight: Float[np.ndarray, "N J"],
    mask: Float[np.ndarray, "N J"],
) -> tuple[float, Float[np.ndarray, "N J"]]:
    kept = mask > 0
    image_loss, image_gradient = _softmax_direction(logits, target * weight * mask, kept, np.ones(len(logits)))
    # The weight belongs to the text: it is the same all the way down a column.
    text_loss, text_gradient = _softmax_direction(logits.T, (target * mask).T, kept.T, weight[0])
    return (image_loss + text_loss) / 2, (image_gradient + text_gradient.T) / 2


def softmax_loss(
    logits: Float[np.ndarray, "N J"],
    target: Float[np.ndarray, "N J"],
    weight: Float[np.ndarray, "N J"],
    mask: Float[np.ndarray, "N J"],
) -> float:
    """CLIP's loss with soft targets: the mean of the image-to-text and text-to-image cross-entropies.

    Masked pairs are outside every denominator. Each image with a positive counts once; its positives share its
    probability by their weight. Each text with a positive counts by its weight.
    """
    return _softmax_loss_and_gradient(logits, target, weight, mask)[0]


def softmax_loss_gradient(
    logits: Float[np.ndarray, "N J"],
    target: Float[np.ndarray, "N J"],
    weight: Float[np.ndarray, "N J"],
    mask: Float[np.ndarray, "N J"],
) -> Float[np.ndarray, "N J"]:
    """Gradient of :func:`softmax_loss` with respect to the logits."""
    return _softmax_loss_and_gradient(logits, target, weight, mask)[1]


def pair_targets(
    image_group: Int[np.ndarray, "N"],
    text_group: Int[np.ndarray, "N C"],
    caption_weight: Float[np.ndarray, "N C"],
    duplicates: DuplicateRule,
) -> tuple[Float[np.ndarray, "N NC"], Float[np.ndarray, "N NC"], Float[np.ndarray, "N NC"]]:
    """Target, weight and mask of every (image, text) pair; column ``owner * C + slot`` is one caption slot.

    A pair of different samples is a duplicate when the pictures are equal, or when the column's text equals one of
    the image's own captions. Slots of weight 0 are empty: their columns are masked and match nothing.
    """
    n, slots = text_group.shape
    target, weight, mask = (np.zeros((n, n * slots)) for _ in range(3))
    for i in range(n):
        own_texts = {text_group[i, slot] for slot in range(slots) if caption_weight[i, slot] > 0}
        for owner in range(n):
            for slot in range(slots):
                j = owner * slots + slot
                weight[i, j] = caption_weight[owner, slot]
                mask[i, j] = caption_weight[owner, slot] > 0
                same = image_group[i] == image_group[owner] or text_group[owner, slot] in own_texts
                if owner == i or (same and duplicates == "positive"):
                    target[i, j] = 1
                elif same and duplicates == "ignore":
                    mask[i, j] = 0
    return target, weight, mask
