"""Which step, layers, curvature, damping, timesteps and draws predict retraining best? The teacher's choices by LDS.

    python -m benchmark.lds_study --study layers --workers 2     # resumable; results/lds/study_layers.json
    python -m benchmark.lds_study --study step                   # of what abu.collect steps has collected
    python -m benchmark.lds_study --study exact                  # of what abu.collect_exact has, in cache/exact_val@<α>
    python -m benchmark.methods abu-plus --layers attn --damping 0.01 --name abu-attn    # what was chosen, as a method

Each variant is an influence function φ(ẑ)ᵀφ(z) on projected gradients (`benchmark.projected`), differing from AbU+ to
first order in one choice, or a finite step of another size. Each study says what its variants have in common, so that
they are compared at one budget. Judged on validation queries, because what is chosen here is used on the test queries.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from abu.cluster import add_cluster_flags, cluster_from
from abu.testbed import testbed_from
from benchmark.gradient_methods import METHODS, Method, collect_method, foresee_method, method_scores
from benchmark.lds import Judge, add_truth_flag, lds_line
from benchmark.methods import AT, EXACT, FINITE_STEP, teacher_scores
from benchmark.projected import FeatureConfig, Measure
from benchmark.retrain import add_judge_flags
from fastgda.core import ROOT, command_line, command_parser, save_json

BASE = METHODS["abu-plus"].features
"""AbU+ to first order: key/value layers, EK-FAC."""


STEPS = (0.001, 0.01, 0.1, 1.0, 10.0)
"""α of the study of steps."""
EXACT_STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
"""α of the study of the exact form; each is collected anew."""


@dataclass(frozen=True)
class Study:
    """Variants by name."""

    fixed: str
    """What is the same for all variants."""
    variants: dict[str, FeatureConfig] = field(default_factory=dict)
    """Of projected gradients."""
    teachers: dict[str, str] = field(default_factory=dict)
    """Of what is collected already: methods of `benchmark.methods`."""

    def method(self, name: str) -> Method:
        """A variant as a method."""
        return Method(self.variants[name], "inner")


def drawn(config: FeatureConfig) -> str:
    """The budget of a variant."""
    training, query = (config.bins * count for count in (config.draws, config.query_draws))
    return f"{training} draws of each training image, {query} of each query"


def step() -> Study:
    """Size of the unlearning step; the terms alone are its limits."""
    found = {f"α = {size:g}": f"{FINITE_STEP}{AT}{size:g}" for size in STEPS}
    terms = {"first term alone (α → 0)": "first-order", "second term alone (α → ∞)": "second-order"}
    return Study("the passes that abu.collect steps has collected", teachers=found | terms)


def exact() -> Study:
    """Size of the step of the exact form."""
    found = {f"α = {size:g}": f"{EXACT}{AT}{size:g}" for size in EXACT_STEPS}
    return Study("what abu.collect_exact has collected with each step", teachers=found)


def layers(measure: Measure = "loss") -> Study:
    """Layers × curvature."""
    base = replace(BASE, measure=measure)
    return Study(
        drawn(base),
        {
            f"{pattern} {kind}": replace(base, layers=pattern, curvature=kind)
            for pattern in ("cross-attn-kv", "cross-attn", "attn", "all")
            for kind in ("none", "diagonal", "ekfac")
        },
    )


def squares() -> Study:
    """Layers × curvature where the squared output is differentiated in place of the loss."""
    return layers("square")


def damping() -> Study:
    """Damping of EK-FAC."""
    shares = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    return Study(drawn(BASE), {f"damping {share:g}": replace(BASE, damping=share) for share in shares})


def draws() -> Study:
    """Draws of each training image, and whether bins are brought to length one."""
    return Study(
        "draws of a query; those of a training image, and with them the cost, grow from line to line",
        {
            f"{count} draws a bin{', normalised' * normalised}": replace(BASE, draws=count, normalised=normalised)
            for count in (1, 2, 4, 8)
            for normalised in (False, True)
        },
    )


def bins() -> Study:
    """Timesteps: all bins, or all draws in one of them."""
    alone = {f"bin {index} of {BASE.bins} alone": replace(BASE, only=index) for index in range(BASE.bins)}
    return Study(drawn(BASE), {"all bins": BASE} | alone)


def strata() -> Study:
    """How finely timesteps are stratified."""
    totals, found = (BASE.bins * BASE.draws, BASE.bins * BASE.query_draws), {}
    for count in (1, 2, 5, 10, 20):
        training, query = (total // count for total in totals)
        if (count * training, count * query) == totals:
            name = f"{count} bins of {training} draws"
            found[name] = replace(BASE, bins=count, draws=training, query_draws=query)
    return Study(drawn(BASE), found)


def measured() -> Study:
    """What is differentiated."""
    return Study(drawn(BASE), {f: replace(BASE, measure=f) for f in ("loss", "square", "mean")})


STUDIES: dict[str, Callable[[], Study]] = {
    study.__name__: study for study in (step, exact, layers, squares, damping, draws, bins, strata, measured)
}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = command_parser("python -m benchmark.lds_study", __doc__)
    add_judge_flags(parser)
    parser.add_argument("--study", choices=sorted(STUDIES), required=True)
    parser.add_argument("--split", choices=("val", "test"), default="val", help="which queries (default: val)")
    parser.add_argument("--models", type=int, default=64, help="models trained on halves (default: 64)")
    add_truth_flag(parser)
    parser.add_argument("--output", type=Path, help="default: results/lds/study_<study>.json")
    add_cluster_flags(parser)
    parser.add_argument("--dry_run", action="store_true", help="print what each variant will need; compute nothing")
    args = parser.parse_args(argv)
    testbed, study = testbed_from(args), STUDIES[args.study]()
    judge, rows = Judge(testbed, args.split, args.models, args.truth), []
    for name in study.variants:
        method = study.method(name)
        if args.dry_run:
            print(
                *(f"{name}: {line}" for line in foresee_method(testbed, method, 1, args.split, args.workers or 1)),
                sep="\n",
            )
            continue
        collect_method(testbed, method, 1, args.split, cluster_from(args))
        settings = {"features": asdict(study.variants[name])}
        rows.append({"variant": name} | settings | judge(method_scores(testbed, method, 1, args.split)[0]))
        print(lds_line(name, rows[-1]))
    for name, teacher in study.teachers.items():
        if args.dry_run:
            print(f"{name}: nothing to collect")
            continue
        rows.append({"variant": name, "method": teacher} | judge(teacher_scores(testbed, teacher, args.split)))
        print(lds_line(name, rows[-1]))
    if rows:
        suffix = "" if args.split == "val" else f"_{args.split}"
        output = args.output or ROOT / f"results/lds/study_{args.study}{suffix}.json"
        save_json(output, {"study": args.study, "fixed": study.fixed} | judge.report(rows))


if __name__ == "__main__":
    sys.exit(main())
