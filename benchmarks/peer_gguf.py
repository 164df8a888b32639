"""Convert a checkpoint for the llama.cpp side of cpu_throughput.py.

    python -m benchmarks.peer_gguf LLAMA_CPP_SOURCE_DIR CHECKPOINT_DIR OUT.gguf [--outtype bf16]

llama.cpp's own converter, told that an unknown vocabulary splits text as SmolLM2's does: it knows
vocabularies by the hash of what they make of a sample text, and ours is cut from that one.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("llama_cpp", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--outtype", default="bf16")
    args = parser.parse_args()
    sys.path.insert(0, str(args.llama_cpp))
    from conversion import base  # type: ignore[import-not-found]

    base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
    sys.argv = ["convert_hf_to_gguf.py", str(args.checkpoint), "--outtype", args.outtype]
    sys.argv += ["--outfile", str(args.out)]
    runpy.run_path(str(args.llama_cpp / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
