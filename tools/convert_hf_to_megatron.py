#!/usr/bin/env python
"""Convert a Hugging Face folder into a Megatron checkpoint, which loads at any layout.

Run it alone, or on several ranks: torchrun --nproc-per-node 4 tools/convert_hf_to_megatron.py ...
"""

import sys

from megatron_dgrpo.checkpoint.tools import convert_hf_to_megatron

if __name__ == "__main__":
    sys.exit(convert_hf_to_megatron())
