"""The phantom benchmark: every method on phantoms with known truth, judged by the same rulers.

    from deconv.evaluation import Store, evaluate, plan_of
    found = evaluate(plan_of(suites=["design"], methods=["cubic", "tv", "preview"]), Store(Path("evaluation")))

    cases      what is measured: phantom, grid, PSF, noise, seed
    methods    what is judged: a label, the method, the preset, and the settings that follow from the case
    measures   how it is judged: the figures of one result
    rows       what is kept: one line of JSON for every run, so that an interrupted benchmark goes on
    running    the loop
    kernels    the paper's validations of kernels;   pictures  CLIP-IQA
    summary    mean and worst case of every method; seed-to-seed spread; promises
    report     Markdown and JSON;   plots  one page of pictures
"""

from __future__ import annotations

from deconv.evaluation.cases import SUITES, Case, chosen_cases
from deconv.evaluation.methods import VARIANTS, Variant, chosen_methods
from deconv.evaluation.rows import Row, Store
from deconv.evaluation.running import Evaluation, Plan, evaluate, plan_of

__all__ = ["SUITES", "VARIANTS", "Case", "Evaluation", "Plan", "Row", "Store", "Variant", "chosen_cases",
           "chosen_methods", "evaluate", "plan_of"]
