"""Small llama GGUF files, written by llama.cpp's own Python package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTERMEDIATE = 4, 2, 8, 32, 64
_PIECES = "he ll \u2581he hello llo \u2581hello \u2581w or ld \u2581world \u2581wor \u2581 h e l o w r d"
SENTENCEPIECES = [
    ("<unk>", 0.0, gguf.TokenType.UNKNOWN),
    ("<s>", 0.0, gguf.TokenType.CONTROL),
    ("</s>", 0.0, gguf.TokenType.CONTROL),
    *[(f"<0x{byte:02X}>", 0.0, gguf.TokenType.BYTE) for byte in range(256)],
    *[(piece, -float(rank), gguf.TokenType.NORMAL) for rank, piece in enumerate(_PIECES.split())],
    ("<tool>", 0.0, gguf.TokenType.USER_DEFINED),
]


def shapes(vocab_size: int, num_layers: int = 1) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocab_size, HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for i in range(num_layers):
        found |= {
            f"blk.{i}.attn_norm.weight": (HIDDEN,),
            f"blk.{i}.ffn_norm.weight": (HIDDEN,),
            f"blk.{i}.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"blk.{i}.attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"blk.{i}.ffn_gate.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{i}.ffn_up.weight": (INTERMEDIATE, HIDDEN),
            f"blk.{i}.ffn_down.weight": (HIDDEN, INTERMEDIATE),
        }
    return found


def write_llama(path: Path, extra: dict[str, np.ndarray[Any, Any]] | None = None, **metadata: Any) -> Path:
    """A one-layer llama with sentencepieces; `metadata` (dots as __) adds strings and integers."""
    writer = gguf.GGUFWriter(path, metadata.pop("arch", "llama"))
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([token for token, _, _ in SENTENCEPIECES])
    writer.add_token_scores([score for _, score, _ in SENTENCEPIECES])
    writer.add_token_types([kind for _, _, kind in SENTENCEPIECES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for name, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    generator = np.random.default_rng(0)
    for name, shape in shapes(len(SENTENCEPIECES)).items():
        writer.add_tensor(name, generator.standard_normal(shape, dtype=np.float32))
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
