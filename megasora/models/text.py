"""Text encoders: captions in, embeddings [M, E] of their valid tokens and a pooled vector [V] out. Frozen; `encode` caches
what they give."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import torch
import torch.nn.functional as F
import xxhash
from megasora_kernels.qknorm_rope import rotation_table
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from megasora.errors import ConfigError
from megasora.models.layers import MLP, rotary_angles, rotate

EOS = 1  # T5's convention: pad 0, eos 1, unk 2, no bos


@dataclass(frozen=True)
class Text:
    """A caption as models read it, fp32 on the host.

    `encode` keeps it at its valid length in the latents' dtype: 2·(M·E + V) bytes in bf16. T5-XXL and UMT5-XXL (E = 4096)
    take 8 kB a token, so 0.8 MB for 100 tokens; padded to 512 they would take 4.2 MB, as much as the video. CLIP-L's
    pooled vector (V = 768) takes 1.5 kB, the small encoder (E = V = 128) 256 bytes a token and 256 for the vector.
    """

    tokens: Tensor  # [M, E]: the valid tokens, the end token the last
    pooled: Tensor  # [V]: one vector for the whole caption; V = 0 when the encoder has none


class TextEncoder(Protocol):
    """What `encode` and `sample` need of a text encoder."""

    width: int  # E
    pooled_width: int  # V; 0: it gives no pooled vector

    def encode(self, captions: list[str]) -> list[Text]:
        """One Text a caption; the empty caption gives the end token alone (CLIP: after its start token)."""
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

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [M, E], rotation [M, K/2, 2] -> [M, E]."""
        q, k, v = self.qkv(F.layer_norm(x, (self.width,))).unflatten(-1, (3, self.heads, -1)).unbind(1)  # [M, N, K]
        q, k = rotate(q, rotation), rotate(k, rotation)
        y = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))  # [N, M, K]
        x = x + self.out(y.transpose(0, 1).flatten(-2))
        return x + self.mlp(F.layer_norm(x, (self.width,)))


class SmallTextEncoder(nn.Module):
    """A sentencepiece tokenizer and a small bidirectional transformer, so that the whole road runs without any download.

    Its weights are seeded, not trained: random features tell captions apart, but know nothing of language. Give
    `encode.text` a T5 directory for real runs. Its pooled vector is the mean of its tokens.
    """

    def __init__(
        self, tokenizer: bytes, width: int = 128, depth: int = 2, heads: int = 4, max_tokens: int = 128
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        self.width, self.pooled_width, self.heads, self.max_tokens = width, width, heads, max_tokens
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
    def encode(self, captions: list[str]) -> list[Text]:
        tokens = [self._encode_one(caption) for caption in captions]  # [M, E] each
        return [Text(x, x.mean(0)) for x in tokens]

    def _encode_one(self, caption: str) -> Tensor:
        ids = [*self.pieces.encode(caption)[: self.max_tokens - 1], EOS]
        device = self.embed.weight.device
        x = self.embed(torch.tensor(ids, device=device))  # [M, E]
        grid = torch.zeros(len(ids), 3, device=device)
        grid[:, 0] = torch.arange(len(ids), device=device)
        rotation = rotation_table(rotary_angles(grid, self.width // self.heads))
        for layer in self.layers:
            x = layer(x, rotation)
        return F.layer_norm(x, (self.width,)).cpu()

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
            digest.update(tensor.cpu().numpy())
        return digest.hexdigest()


class T5TextEncoder:
    """A T5 (Raffel et al. 2020) or UMT5 (Chung et al. 2023) encoder of a local directory, without a pooled vector."""

    def __init__(
        self,
        directory: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        max_tokens: int = 512,
    ) -> None:
        transformers = import_transformers(directory)
        kind = {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[model_type(directory)]
        self.directory, self.max_tokens = directory, max_tokens
        self.pieces = open_pieces(tokenizer_directory(directory))
        self.model = open_model(kind, directory, dtype).to(device)
        self.width, self.pooled_width = self.model.config.d_model, 0

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Text]:
        ids = [torch.tensor([*self.pieces(caption)[: self.max_tokens - 1], EOS]) for caption in captions]
        padded = pad_sequence(ids, batch_first=True).to(self.model.device)  # [B, M]
        valid = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(self.model.device)  # [B, M]
        hidden = self.model(input_ids=padded, attention_mask=valid).last_hidden_state.float().cpu()  # [B, M, E]
        return [Text(h[: len(i)], torch.zeros(0)) for h, i in zip(hidden, ids, strict=True)]

    def fingerprint(self) -> str:
        return fingerprint_files(self.directory, (str(self.model.dtype), self.max_tokens))


class CLIPTextEncoder:
    """The text model of a CLIP (Radford et al. 2021) of a local directory: its last hidden states and, as pooled vector, that of
    the end token, unprojected, which Flux, HunyuanVideo and Open-Sora 2.0 are conditioned on."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        transformers = import_transformers(directory)
        tokenizer = tokenizer_directory(directory)
        if not any((tokenizer / name).exists() for name in ("tokenizer.json", "vocab.json")):
            raise ConfigError(f"encode.text: {tokenizer} has no tokenizer.json or vocab.json")
        self.directory = directory
        self.tokenizer = transformers.CLIPTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self.model = open_model(transformers.CLIPTextModel, directory, dtype).to(device)
        self.max_tokens = self.model.config.max_position_embeddings
        self.width = self.pooled_width = self.model.config.hidden_size

    @torch.no_grad()
    def encode(self, captions: list[str]) -> list[Text]:
        batch = self.tokenizer(captions, max_length=self.max_tokens, truncation=True, padding=True, return_tensors="pt")
        output = self.model(**batch.to(self.model.device))
        hidden, pooled = output.last_hidden_state.float().cpu(), output.pooler_output.float().cpu()  # [B, M, E], [B, V]
        lengths = batch["attention_mask"].sum(1).tolist()
        return [Text(h[:length], p) for h, p, length in zip(hidden, pooled, lengths, strict=True)]

    def fingerprint(self) -> str:
        return fingerprint_files(self.directory, str(self.model.dtype))


class PairTextEncoder:
    """The tokens of one encoder with the pooled vector of another, as Open-Sora 2.0 has T5-XXL's and CLIP-L's."""

    def __init__(self, tokens: TextEncoder, pooled: TextEncoder) -> None:
        self.tokens, self.pooled = tokens, pooled
        self.width, self.pooled_width = tokens.width, pooled.pooled_width

    def encode(self, captions: list[str]) -> list[Text]:
        pairs = zip(self.tokens.encode(captions), self.pooled.encode(captions), strict=True)
        return [Text(first.tokens, second.pooled) for first, second in pairs]

    def fingerprint(self) -> str:
        return f"{self.tokens.fingerprint()},{self.pooled.fingerprint()}"


def import_transformers(directory: Path) -> Any:
    """The extra [encoders]. Raises ConfigError that names it."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(f"encode.text: {directory} needs transformers: pip install 'megasora[encoders]'") from None
    return transformers


def open_model(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """A model of transformers, frozen, without its progress bars and warnings. Nothing is downloaded.

    Raises ConfigError when the weights cannot be read or some are missing: transformers would draw those at random.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, report = kind.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"encode.text: {directory}: {' '.join(str(error).split())}") from None
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ConfigError(f"encode.text: {directory} lacks {len(missing)} weights of a {kind.__name__}: {missing[0]}")
    return model.eval().requires_grad_(False)


def open_pieces(directory: Path) -> Callable[[str], list[int]]:
    """What cuts a caption into ids, without the end token: the tokenizer.json of a T5, or else its spiece.model.

    Not by transformers' classes: 5.24 makes up a tokenizer where there are no files, loses byte pieces, and cannot open a
    UMT5's spiece.model. Raises ConfigError when neither file is there.
    """
    from tokenizers import Tokenizer  # comes with transformers

    fast, pieces = directory / "tokenizer.json", directory / "spiece.model"
    if fast.exists():
        tokenizer = Tokenizer.from_file(str(fast))
        tokenizer.no_truncation()  # the file may ask for it
        return lambda caption: tokenizer.encode(caption, add_special_tokens=False).ids
    if pieces.exists():
        processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
        return lambda caption: processor.encode(caption)
    raise ConfigError(f"encode.text: {directory} has no tokenizer.json or spiece.model")


def tokenizer_directory(directory: Path) -> Path:
    """Where an encoder's tokenizer lies: in its directory, or, as diffusers lays out pipelines (text_encoder_2, tokenizer_2),
    beside it."""
    beside = directory.parent / directory.name.replace("text_encoder", "tokenizer")
    return beside if beside.is_dir() else directory


def fingerprint_files(directory: Path, settings: object) -> str:
    """Of all files of an encoder and of its tokenizer, and of the settings that change what it gives."""
    digest = xxhash.xxh3_64(repr(settings).encode())
    for path in sorted(p for d in {directory, tokenizer_directory(directory)} for p in d.iterdir() if p.is_file()):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def model_type(directory: Path) -> str:
    """What config.json says the directory holds. Raises ConfigError when it says nothing."""
    try:
        return str(json.loads((directory / "config.json").read_text())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"encode.text: {directory} holds no text encoder ({error})") from None


def load_text_encoder(
    spec: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """Opens encode.text: a directory, or two as in T5_DIR,CLIP_DIR, tokens of the first and the pooled vector of the second.

    `dtype` is that of a published encoder's weights: UMT5-XXL takes 23 GB in fp32 and half of it in bf16. Raises ConfigError
    naming the directory.
    """
    directories = [Path(part.strip()) for part in str(spec).split(",")]
    if len(directories) > 2:
        raise ConfigError(f"encode.text={spec}: one directory, or two for tokens and pooled vector")
    encoders = [open_directory(directory, device, dtype) for directory in directories]
    if len(encoders) == 1:
        return encoders[0]
    if not encoders[1].pooled_width:
        raise ConfigError(f"encode.text: {directories[1]} gives no pooled vector; a CLIP directory comes second")
    return PairTextEncoder(*encoders)


def open_directory(directory: Path, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
    """One encoder, by the `model_type` in its config.json."""
    kind = model_type(directory)
    if kind == "megasora-small-text":
        return SmallTextEncoder.load(directory).to(device)
    if kind in ("t5", "umt5"):
        return T5TextEncoder(directory, device, dtype)
    if kind in ("clip", "clip_text_model"):
        return CLIPTextEncoder(directory, device, dtype)
    raise ConfigError(f"encode.text: {directory} is a {kind!r}; known are megasora-small-text, t5, umt5 and clip")
