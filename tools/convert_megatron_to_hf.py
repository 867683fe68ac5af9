#!/usr/bin/env python
"""Convert a Megatron checkpoint into a Hugging Face folder of sharded safetensors.

Run it alone, or on several ranks: torchrun --nproc-per-node 4 tools/convert_megatron_to_hf.py ...
"""

import sys

from megatron_dgrpo.checkpoint.tools import convert_megatron_to_hf

if __name__ == "__main__":
    sys.exit(convert_megatron_to_hf())
