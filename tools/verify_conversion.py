#!/usr/bin/env python
"""Compare a Megatron checkpoint with a Hugging Face folder: weights, and outputs of every layer.

Run it alone, or on several ranks: torchrun --nproc-per-node 4 tools/verify_conversion.py ...
"""

import sys

from megatron_dgrpo.checkpoint.tools import verify_conversion

if __name__ == "__main__":
    sys.exit(verify_conversion())
