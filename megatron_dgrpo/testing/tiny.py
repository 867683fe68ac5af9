"""Tiny models and tokenizers as real Hugging Face folders, made on the spot.

vLLM's attention on CPU takes a head_dim of 32 or more, so that is the least here. Weights depend on the seed and the
parameter's name alone: models of the same sizes that differ in `tied` or `dtype` share the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32


def save_tiny(
    folder: str | Path,
    family: str = "Qwen3",
    *,
    vocab_size: int,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 32,
    intermediate: int | None = None,
    tied: bool = True,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.05,
    random_norms: bool = False,
    rope_theta: float = 10000.0,
    rope: Mapping[str, Any] | None = None,
    max_positions: int = 512,
    special_ids: tuple[int, int, int] | None = None,
    max_shard_bytes: int | None = None,
    **settings: Any,
) -> Path:
    """A model with random weights: config.json, generation_config.json and safetensors.

    `family` is the first part of transformers' class names (Qwen3, Qwen3Moe, Qwen2, Llama, Mistral); `settings` go into
    its config as they are, and `rope` into its rope_parameters. Trained models begin with norms of 1 and biases of 0,
    as here; with `random_norms` they scatter around it, so that a test of norms can fail. `special_ids` are those of
    BOS, EOS and padding. With `max_shard_bytes` the weights are cut into files.
    """
    import torch
    import transformers

    bos, eos, pad = special_ids or (None, None, None)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate or 2 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        tie_word_embeddings=tied, max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta} | dict(rope or {}),
        bos_token_id=bos, eos_token_id=eos, pad_token_id=pad, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
        norm, bias = "norm" in name, name.endswith("bias")
        if not norm and not bias:
            parameter.data.normal_(0.0, std, generator=generator)
        elif random_norms:
            parameter.data.normal_(float(norm), 0.2, generator=generator)
        else:
            parameter.data.fill_(float(norm))
    model = model.to(getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    sharding = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    model.save_pretrained(folder, **sharding)
    return Path(folder)


def save_tiny_qwen3(folder: str | Path, **settings: Any) -> Path:
    """A Qwen3."""
    return save_tiny(folder, "Qwen3", **settings)


def save_tokenizer(
    folder: str | Path,
    tokens: Sequence[str],
    *,
    bos: str = "<bos>",
    eos: str = "<eos>",
    pad: str = "<pad>",
    starts_with_bos: bool = True,
) -> tuple[int, int, int]:
    """A tokenizer of whole words, parted by white space; returns the ids of BOS, EOS and padding.

    The words have the ids 0, 1, ... and the three special tokens the next ones. There is no token for unknown words:
    text with any other word in it can't be encoded.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (bos, eos, pad)])
    special_ids = len(tokens), len(tokens) + 1, len(tokens) + 2
    if starts_with_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, len(tokens))]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.save_pretrained(folder)
    return special_ids
