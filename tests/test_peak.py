"""The peak of the memory, counted anew."""

from __future__ import annotations

import numpy as np

from abu.peak import forget_peak, peak_bytes


def test_what_was_given_back_before_does_not_count():
    size = 64 * 2**20
    gone = np.ones(4 * size, np.uint8)
    del gone
    before = forget_peak()
    assert before <= peak_bytes() < before + size // 2
    kept = np.ones(size, np.uint8)
    assert before + size // 2 < peak_bytes() < before + 2 * size
    assert kept.any()
