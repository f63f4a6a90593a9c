# shellcheck shell=bash
# Lets MKL, the matrix library inside PyTorch, use its AVX-512 kernels on an AMD processor; source it before other commands:
#
#   source scripts/mkl_on_amd.sh
#
# MKL asks who made the processor before it looks at what it can do. The one function that it asks is replaced by a
# preloaded library of one line. On a Zen 5 server float32 matrix products ran 2.3 times as fast (106 and 250 GFLOPS on one
# core); results differ by rounding. Needs a C compiler; does nothing where the processor is not AMD's.
if grep -q AuthenticAMD /proc/cpuinfo && grep -q avx512f /proc/cpuinfo; then
    mkl_on_amd=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/lib/libmkl_on_amd.so
    if [ ! -f "$mkl_on_amd" ]; then
        echo 'int mkl_serv_intel_cpu_true(void) { return 1; }' | "${CC:-cc}" -shared -fPIC -x c -o "$mkl_on_amd" -
    fi
    export LD_PRELOAD=$mkl_on_amd${LD_PRELOAD:+:$LD_PRELOAD}
fi
