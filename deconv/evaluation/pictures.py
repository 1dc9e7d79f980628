"""How images look to CLIP-IQA, the second quality index of the paper's Table 3, where its weights are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deconv.evaluation.running import Evaluation
from deconv.quality.clip_iqa import Encoder, clip_iqa_volume

__all__ = ["ClipScore", "clip_scores"]

TRUTH = "truth"
Say = Callable[[str], None]


@dataclass(frozen=True)
class ClipScore:
    """CLIP-IQA (0 to 1) of one method's image of a case, mean over its three projections; of the truth beside them."""

    case_label: str
    method: str
    seed: int
    value: float


def clip_scores(evaluation: Evaluation, encoder: Encoder, *, say: Say = lambda line: None) -> tuple[ClipScore, ...]:
    """The scores of every run whose image was kept, each on the window from nothing to the truth's maximum."""
    found: list[ClipScore] = []
    for case in dict.fromkeys(evaluation.plan.cases):
        truth = case.build().truth
        window = (0.0, float(truth.array.max()))
        found.append(ClipScore(case.label, TRUTH, 0, clip_iqa_volume(truth, encoder, window=window)))
        for row in (row for row in evaluation.rows if row.case_label == case.label and not row.failed):
            arrays = evaluation.store.arrays(row.key)
            if arrays is None:
                say(f"{row.case_label} · {row.method}: no CLIP-IQA, its image was not kept")
                continue
            score = clip_iqa_volume(truth.with_array(arrays.image), encoder, window=window)
            found.append(ClipScore(case.label, row.method, row.seed, score))
    return tuple(found)
