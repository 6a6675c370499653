"""Text encoders: captions in, embeddings [M, E] of their valid tokens out. Frozen; `encode` caches what they give."""

import io
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import sentencepiece
import torch
import torch.nn.functional as F
import xxhash
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megasora.errors import ConfigError
from megasora.models.layers import MLP, rotary_angles, rotate

EOS = 1  # T5's convention: pad 0, eos 1, unk 2, no bos


class TextEncoder(Protocol):
    """What `encode` and `sample` need of a text encoder."""

    width: int

    def encode(self, captions: list[str]) -> list[Tensor]:
        """One fp32 [M_i, E] a caption, at its own valid length; the empty caption gives the end token alone."""
        ...

    def fingerprint(self) -> str:
        """Changes when the tokenizer or a weight does: cached embeddings are tied to it."""
        ...


def train_tokenizer(captions: Iterable[str], vocabulary: int) -> bytes:
    """A sentencepiece model of at most `vocabulary` pieces, bytes as fallback so that any prompt can be read."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions), model_writer=model, vocab_size=vocabulary, hard_vocab_limit=False,
        pad_id=0, eos_id=EOS, unk_id=2, bos_id=-1, byte_fallback=True, num_threads=1, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


class TextLayer(nn.Module):
    """A pre-norm transformer layer over one caption."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = MLP(width, 4 * width, width, nn.GELU())

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """x [M, E], angles [M, K/2] -> [M, E]."""
        q, k, v = self.qkv(F.layer_norm(x, (self.width,))).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [M, N, K]
        q, k = rotate(q, angles), rotate(k, angles)
        y = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))  # [N, M, K]
        x = x + self.out(y.transpose(0, 1).flatten(-2))
        return x + self.mlp(F.layer_norm(x, (self.width,)))


class SmallTextEncoder(nn.Module):
    """A sentencepiece tokenizer and a small bidirectional transformer, so that the whole road runs without any download.

    Its weights are seeded, not trained: random features tell captions apart, but know nothing of language. Give
    `encode.text` a T5 directory for real runs.
    """

    def __init__(
        self, tokenizer: bytes, width: int = 128, depth: int = 2, heads: int = 4, max_tokens: int = 128
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.width, self.heads, self.max_tokens = width, heads, max_tokens
        self.shape = {"width": width, "depth": depth, "heads": heads, "max_tokens": max_tokens}
        self.embed = nn.Embedding(self.pieces.get_piece_size(), width)
        self.layers = nn.ModuleList(TextLayer(width, heads) for _ in range(depth))

    @classmethod
    def create(cls, captions: Iterable[str], width: int, seed: int = 0) -> "SmallTextEncoder":
        """Trains the tokenizer on the captions and draws the weights from `seed`."""
        encoder = cls(train_tokenizer(captions, vocabulary=2048), width=width)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in encoder.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 if "embed" in name else width**-0.5, generator=generator)
        return encoder.eval()

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        return [self._encode_one(caption) for caption in captions]

    def _encode_one(self, caption: str) -> Tensor:
        ids = [*self.pieces.encode(caption)[: self.max_tokens - 1], EOS]
        x = self.embed(torch.tensor(ids))  # [M, E]
        grid = torch.zeros(len(ids), 3)
        grid[:, 0] = torch.arange(len(ids))
        angles = rotary_angles(grid, self.width // self.heads)
        for layer in self.layers:
            x = layer(x, angles)
        return F.layer_norm(x, (self.width,))

    def save(self, directory: Path) -> None:
        """Writes config.json, tokenizer.model and model.safetensors. The directory appears complete; one that is there stays."""
        hidden = directory.with_name(f".{directory.name}.{os.getpid()}")
        hidden.mkdir(parents=True, exist_ok=True)
        (hidden / "tokenizer.model").write_bytes(self.tokenizer)
        save_file(self.state_dict(), hidden / "model.safetensors")
        (hidden / "config.json").write_text(json.dumps({"model_type": "megasora-small-text", **self.shape}, indent=1))
        try:
            hidden.rename(directory)
        except OSError:  # another process was faster
            shutil.rmtree(hidden)

    @classmethod
    def load(cls, directory: Path) -> "SmallTextEncoder":
        config = json.loads((directory / "config.json").read_text())
        del config["model_type"]
        encoder = cls((directory / "tokenizer.model").read_bytes(), **config)
        encoder.load_state_dict(load_file(directory / "model.safetensors"))
        return encoder.eval()

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_64(self.tokenizer)
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.numpy())
        return digest.hexdigest()


class T5TextEncoder:
    """A T5 or UMT5 encoder of transformers, from a local directory (extra [encoders]); nothing is downloaded."""

    def __init__(self, directory: Path, max_tokens: int = 512) -> None:
        try:
            from transformers import AutoTokenizer, T5EncoderModel, UMT5EncoderModel
        except ImportError:
            raise ConfigError(
                "encode.text: a T5 encoder needs transformers: pip install 'megasora[encoders]'"
            ) from None
        kind = json.loads((directory / "config.json").read_text())["model_type"]
        model = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel}[kind]
        self.directory, self.max_tokens = directory, max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self.model = model.from_pretrained(directory, local_files_only=True).eval()
        self.width = self.model.config.d_model

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Tensor]:
        batch = self.tokenizer(captions, max_length=self.max_tokens, truncation=True, padding=True, return_tensors="pt")
        hidden = self.model(**batch).last_hidden_state  # [B, M, E]
        return [h[mask.bool()].float() for h, mask in zip(hidden, batch["attention_mask"], strict=True)]

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_64()
        for path in sorted(p for p in self.directory.iterdir() if p.is_file()):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        return digest.hexdigest()


def load_text_encoder(directory: Path) -> TextEncoder:
    """Opens a directory by the `model_type` in its config.json. Raises ConfigError naming the directory."""
    try:
        kind = json.loads((directory / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"encode.text: {directory} holds no text encoder ({error})") from None
    if kind == "megasora-small-text":
        return SmallTextEncoder.load(directory)
    if kind in ("t5", "umt5"):
        return T5TextEncoder(directory)
    raise ConfigError(f"encode.text: {directory} is a {kind!r}; known are megasora-small-text, t5 and umt5")
