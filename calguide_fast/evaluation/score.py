"""Inception score: are samples classified surely, and into many classes?"""

from __future__ import annotations

import torch

from calguide_fast.evaluation._features import ArrayLike, as_features, check_same_width

SPLIT = 5000


def inception_score(logits: ArrayLike, split_size: int = SPLIT) -> float:
    """Inception score of a classifier's logits (N, C); see :class:`StreamingInceptionScore`."""
    return StreamingInceptionScore(split_size).update(logits).result()


class StreamingInceptionScore:
    """exp E_x KL(p(y|x) ‖ p(y)), averaged over splits of consecutive samples, from logits that come in batches.

    In 1..C. A split's p(y) is its own, so that shuffled samples score otherwise than samples sorted by class. The last
    split holds what is left over and counts as much as any other, as in the evaluator of Dhariwal & Nichol, 2021.
    Source: Salimans et al., 2016.

    Args:
        split_size: samples of a split.

    Raises:
        ValueError: split_size is below 1.
    """

    def __init__(self, split_size: int = SPLIT) -> None:
        if split_size < 1:
            raise ValueError(f"split_size must be at least 1, got {split_size}")
        self.split_size = split_size
        self._scores: list[float] = []
        self._clear()

    def _clear(self) -> None:
        self._in_split = 0
        self._negative_entropy = 0.0  # Σ_x Σ_y p log p
        self._marginal: torch.Tensor | None = None  # [C], Σ_x p

    def update(self, logits: ArrayLike) -> StreamingInceptionScore:
        """Take in a batch (B, C); returns itself.

        Raises ValueError for another shape, another width than before in this split, or values that are not finite.
        """
        log_p = as_features(logits, "logits", at_least=1).log_softmax(1)
        start = 0
        while start < len(log_p):
            part = log_p[start : start + self.split_size - self._in_split]
            p = part.exp()
            if self._marginal is None:
                self._marginal = torch.zeros_like(p[0])
            check_same_width(p, self._marginal, "a batch of logits", "the batch before")
            self._marginal += p.sum(0)
            self._negative_entropy += (p * part).sum().item()
            self._in_split += len(part)
            if self._in_split == self.split_size:
                self._scores.append(self._score_of_split(self._marginal))
                self._clear()
            start += len(part)
        return self

    def result(self) -> float:
        """The mean of the splits' scores.

        Raises ValueError where no sample was taken in.
        """
        scores = self._scores if self._marginal is None else [*self._scores, self._score_of_split(self._marginal)]
        if not scores:
            raise ValueError("an Inception score of 0 samples was asked for, at least 1 is needed")
        return sum(scores) / len(scores)

    def _score_of_split(self, marginal: torch.Tensor) -> float:
        mean = marginal / self._in_split
        return (self._negative_entropy / self._in_split - torch.xlogy(mean, mean).sum()).exp().item()
