"""Which layers, curvature, damping, timesteps and draws predict retraining best? The teacher's choices judged by LDS.

    python -m benchmark.lds_study --study layers --workers 2     # resumable; results/lds/study_layers.json
    python -m benchmark.lds_study --study draws

Each variant is an influence function φ(ẑ)ᵀφ(z) on projected gradients (`benchmark.projected`), differing from the first
in one choice. Judged on validation queries, because what is chosen here is used on the test queries.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from abu.cluster import add_cluster_flags, cluster_from
from abu.testbed import testbed_from
from benchmark.gradient_methods import METHODS, Method, collect_method, foresee_method, method_scores
from benchmark.lds import Judge, add_truth_flag, lds_line
from benchmark.projected import FeatureConfig
from benchmark.retrain import add_judge_flags
from fastgda.core import ROOT, command_line, save_json

BASE = METHODS["abu-plus"].features
"""AbU+ to first order: key/value layers, EK-FAC."""


@dataclass(frozen=True)
class Study:
    """Variants by name."""

    variants: dict[str, FeatureConfig] = field(default_factory=dict)

    def method(self, name: str) -> Method:
        """A variant as a method."""
        return Method(self.variants[name], "inner")


def layers() -> Study:
    """Layers × curvature."""
    return Study(
        {
            f"{pattern} {kind}": replace(BASE, layers=pattern, curvature=kind)
            for pattern in ("cross-attn-kv", "cross-attn", "attn", "all")
            for kind in ("none", "diagonal", "ekfac")
        }
    )


def damping() -> Study:
    """Damping of EK-FAC."""
    return Study({f"damping {share:g}": replace(BASE, damping=share) for share in (1e-3, 1e-2, 0.1, 1.0, 10.0)})


def draws() -> Study:
    """Draws of each training image, and whether bins are brought to length one."""
    return Study(
        {
            f"{count} draws a bin{', normalised' * normalised}": replace(BASE, draws=count, normalised=normalised)
            for count in (1, 2, 4, 8)
            for normalised in (False, True)
        }
    )


def measured() -> Study:
    """What is differentiated."""
    return Study({f: replace(BASE, measure=f) for f in ("loss", "square", "mean")})


STUDIES: dict[str, Callable[[], Study]] = {"layers": layers, "damping": damping, "draws": draws, "measured": measured}


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.lds_study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
            print(*(f"{name}: {line}" for line in foresee_method(testbed, method, 1, args.workers or 1)), sep="\n")
            continue
        collect_method(testbed, method, 1, cluster_from(args))
        rows.append({"variant": name} | judge(method_scores(testbed, method, 1, args.split)[0]))
        print(lds_line(name, rows[-1]))
    if rows:
        suffix = "" if args.split == "val" else f"_{args.split}"
        output = args.output or ROOT / f"results/lds/study_{args.study}{suffix}.json"
        save_json(output, judge.report(rows))


if __name__ == "__main__":
    sys.exit(main())
