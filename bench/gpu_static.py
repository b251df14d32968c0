"""`python -m bench.gpu_static`: see bench/gpu/static_triton.py."""

import sys

from .gpu.static_triton import main

if __name__ == "__main__":
    sys.exit(main())
