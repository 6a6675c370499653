"""T5, UMT5 and CLIP encoders held to transformers itself, on tiny random models with tokenizers trained here."""

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from megasora.errors import ConfigError
from megasora.models.text import (
    CLIPTextEncoder,
    PairTextEncoder,
    SmallTextEncoder,
    T5TextEncoder,
    load_text_encoder,
    open_pieces,
    train_tokenizer,
)

transformers = pytest.importorskip("transformers")

CAPTIONS = ["a rabbit in a green meadow", "", "two people ride bicycles", "a car phone"]
SHAPE = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
MODELS = {
    "t5": (transformers.T5Config, transformers.T5EncoderModel),
    "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
}


def save_t5(directory: Path, kind: str) -> Path:
    """A tiny T5 with spiece.model, as google/t5-v1_1-xxl, or a UMT5 with tokenizer.json, as Wan 2.1 has."""
    config, model = MODELS[kind]
    torch.manual_seed(0)
    model(config(vocab_size=512, **SHAPE)).save_pretrained(directory)
    (directory / "spiece.model").write_bytes(train_tokenizer(CAPTIONS, 512))
    if kind == "umt5":
        transformers.T5Tokenizer.from_pretrained(directory).save_pretrained(directory)
        (directory / "spiece.model").unlink()
    return directory


def save_clip(directory: Path, eos_token_id: int = 258, kind: str = "clip_text_model") -> Path:
    """A tiny CLIP over letters, letters that end a word and two merges; the special tokens come last, as CLIP has them."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = {piece: i for i, piece in enumerate([*letters, *(letter + "</w>" for letter in letters), "ra", "rab</w>"])}
    words |= {"<|startoftext|>": 257, "<|endoftext|>": 258}
    directory.mkdir(parents=True)
    (directory / "vocab.json").write_text(json.dumps(words))
    (directory / "merges.txt").write_text("#version: 0.2\nr a\nra b</w>\n")
    torch.manual_seed(1)
    text = transformers.CLIPTextConfig(
        vocab_size=259, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=257, eos_token_id=eos_token_id, pad_token_id=258,
    )  # fmt: skip
    if kind == "clip_text_model":
        model = transformers.CLIPTextModel(text)
    else:
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = transformers.CLIPModel(
            transformers.CLIPConfig(
                text_config=text.to_dict(), vision_config=vision | {"image_size": 8, "patch_size": 8}, projection_dim=8
            )
        )
    for name, parameter in model.named_parameters():
        if "position" in name or "token_embedding" in name:
            torch.nn.init.normal_(parameter)  # CLIP's own start is too small to tell anything apart
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["t5", "umt5"])
def t5(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("text") / request.param, request.param)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("text") / "clip")


def by_transformers(directory: Path, captions: list[str], length: int) -> list[torch.Tensor]:
    """The embeddings as pipelines make them: padded to `length`, masked, cut to the mask."""
    kind = json.loads((directory / "config.json").read_text())["model_type"]
    model = MODELS[kind][1].from_pretrained(directory).eval()
    tokenizer = transformers.T5Tokenizer.from_pretrained(directory)
    batch = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    return [h[: int(mask.sum())] for h, mask in zip(hidden, batch["attention_mask"], strict=True)]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_t5s_embeddings_are_transformers_own_at_their_valid_length(t5: Path) -> None:
    encoder = load_text_encoder(t5)
    assert isinstance(encoder, T5TextEncoder)
    texts = encoder.encode(CAPTIONS)
    for text, expected in zip(texts, by_transformers(t5, CAPTIONS, 40), strict=True):
        assert_close(text.tokens, expected)
        assert text.pooled.shape == (encoder.pooled_width,) == (0,)
    assert len({len(text.tokens) for text in texts}) == 4
    assert encoder.width == 32


def test_a_batch_equals_one_by_one_and_the_empty_caption_is_the_end_token(t5: Path) -> None:
    encoder = T5TextEncoder(t5)
    for caption, text in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        assert_close(text.tokens, encoder.encode([caption])[0].tokens)
    with torch.no_grad():
        assert_close(encoder.encode([""])[0].tokens, encoder.model(input_ids=torch.tensor([[1]])).last_hidden_state[0])


def test_a_long_caption_is_cut_and_keeps_its_end_token(t5: Path) -> None:
    encoder, long = T5TextEncoder(t5, max_tokens=8), "a rabbit " * 50
    text = encoder.encode([long, "a"])[0]
    assert text.tokens.shape == (8, 32)
    assert_close(text.tokens, by_transformers(t5, [long], 8)[0])


def test_pieces_are_those_of_transformers(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # as T5's: no pieces for bytes
        sentence_iterator=iter(CAPTIONS * 3), model_writer=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = transformers.T5Tokenizer.from_pretrained(tmp_path)
    strange = [*CAPTIONS, "  a  rabbit\n rides\ta car ", "A Rabbit, 漢字 é ß; 7", "ａ　ｃａｒ ﬁne", "​a­b", " "]
    expected = [tokenizer(caption).input_ids for caption in strange]
    assert [[*open_pieces(tmp_path)(caption), 1] for caption in strange] == expected
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "spiece.model").unlink()
    assert [[*open_pieces(tmp_path)(caption), 1] for caption in strange] == expected


def test_umt5s_spiece_model_is_enough_and_keeps_its_bytes(tmp_path: Path) -> None:
    directory = save_t5(tmp_path / "umt5", "umt5")
    for path in directory.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"^encode.text: .*umt5 has no tokenizer.json or spiece.model$"):
        load_text_encoder(directory)
    (directory / "spiece.model").write_bytes(train_tokenizer(CAPTIONS, 512))
    encoder = T5TextEncoder(directory)
    assert len(encoder.encode(["漢"])[0].tokens) == 1 + 3 + 1  # space, three bytes, end
    assert 2 not in encoder.pieces("漢")


def test_half_precision_is_near_and_has_a_fingerprint_of_its_own(t5: Path) -> None:
    full, half = load_text_encoder(t5), load_text_encoder(t5, dtype=torch.bfloat16)
    a, b = full.encode(CAPTIONS)[0].tokens, half.encode(CAPTIONS)[0].tokens
    assert b.dtype == torch.float32
    assert 1e-4 < (a - b).norm() / a.norm() < 3e-2
    assert full.fingerprint() == load_text_encoder(t5).fingerprint() != half.fingerprint()


def test_every_file_changes_the_fingerprint(tmp_path: Path) -> None:
    directory = save_t5(tmp_path / "t5", "t5")
    encoder = T5TextEncoder(directory)
    seen = {encoder.fingerprint()}
    for count, path in enumerate(sorted(directory.iterdir()), start=2):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
        seen.add(encoder.fingerprint())
        assert len(seen) == count, path
    assert count == 4  # config.json, model.safetensors, spiece.model


@pytest.mark.parametrize("eos_token_id", [2, 258])  # 2 is in the config of CLIP-L: the highest id then marks the end
def test_clip_gives_what_flux_and_hunyuan_video_pool(tmp_path: Path, eos_token_id: int) -> None:
    directory = save_clip(tmp_path / "clip", eos_token_id)
    encoder = load_text_encoder(directory)
    assert isinstance(encoder, CLIPTextEncoder)
    captions = [*CAPTIONS[1:], "a rabbit " * 20]
    tokenizer = transformers.CLIPTokenizer.from_pretrained(directory)
    padded = tokenizer(captions, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = transformers.CLIPTextModel.from_pretrained(directory).eval()(padded)  # no mask, as they call it
    texts = encoder.encode(captions)
    for i, text in enumerate(texts):
        assert_close(text.pooled, expected.pooler_output[i])
        assert_close(text.tokens, expected.last_hidden_state[i, : len(text.tokens)])
        assert_close(text.pooled, text.tokens[-1])
        assert_close(text.pooled, encoder.encode(captions[i : i + 1])[0].pooled)
    assert [len(text.tokens) for text in texts] == [2, 16, 11, 16]
    assert torch.pdist(torch.stack([text.pooled for text in texts])).min() > 0.1
    assert encoder.width == encoder.pooled_width == 24


def test_published_names_and_a_whole_clip_give_the_same(tmp_path: Path, clip: Path) -> None:
    shutil.copytree(clip, tmp_path / "named")  # as openai/clip-vit-large-patch14 names its weights
    weights = load_file(clip / "model.safetensors")
    renamed = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in weights.items()}
    renamed["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(renamed, tmp_path / "named" / "model.safetensors", {"format": "pt"})
    expected = CLIPTextEncoder(clip).encode(CAPTIONS)
    assert_close(load_text_encoder(tmp_path / "named").encode(CAPTIONS)[0].pooled, expected[0].pooled)

    whole = save_clip(tmp_path / "whole", kind="clip")
    model = transformers.CLIPModel.from_pretrained(whole).eval()
    ids = transformers.CLIPTokenizer.from_pretrained(whole)(CAPTIONS[3], return_tensors="pt").input_ids
    with torch.no_grad():
        assert_close(load_text_encoder(whole).encode(CAPTIONS)[3].pooled, model.text_model(ids).pooler_output[0])


def test_a_whole_t5_gives_its_encoder(tmp_path: Path, t5: Path) -> None:
    directory = tmp_path / "whole"
    shutil.copytree(t5, directory)
    kind = json.loads((t5 / "config.json").read_text())["model_type"]
    classes: dict[str, Any] = {
        "t5": transformers.T5ForConditionalGeneration,
        "umt5": transformers.UMT5ForConditionalGeneration,
    }
    model = classes[kind](MODELS[kind][0](vocab_size=512, num_decoder_layers=1, **SHAPE)).eval()
    model.save_pretrained(directory)
    encoder = T5TextEncoder(directory)
    ids = torch.tensor([[*encoder.pieces(CAPTIONS[0]), 1]])
    with torch.no_grad():
        assert_close(encoder.encode(CAPTIONS)[0].tokens, model.encoder(ids).last_hidden_state[0])


def test_two_directories_give_tokens_and_pooled_vector(t5: Path, clip: Path) -> None:
    pair = load_text_encoder(f"{t5}, {clip}")
    assert isinstance(pair, PairTextEncoder)
    assert (pair.width, pair.pooled_width) == (32, 24)
    for both, first, second in zip(
        pair.encode(CAPTIONS), T5TextEncoder(t5).encode(CAPTIONS), CLIPTextEncoder(clip).encode(CAPTIONS), strict=True
    ):
        assert torch.equal(both.tokens, first.tokens)
        assert torch.equal(both.pooled, second.pooled)
    prints = {load_text_encoder(spec).fingerprint() for spec in (t5, clip, f"{t5},{clip}", f"{clip},{clip}")}
    assert len(prints) == 4


def test_diffusers_keeps_the_tokenizer_beside_the_encoder(tmp_path: Path, t5: Path, clip: Path) -> None:
    for directory, name in ((t5, ""), (clip, "_2")):
        encoder, tokenizer = tmp_path / f"text_encoder{name}", tmp_path / f"tokenizer{name}"
        shutil.copytree(directory, encoder)
        tokenizer.mkdir()
        for path in [p for p in encoder.iterdir() if p.name not in ("config.json", "model.safetensors")]:
            path.rename(tokenizer / path.name)
    pair = load_text_encoder(f"{tmp_path / 'text_encoder'},{tmp_path / 'text_encoder_2'}")
    expected = load_text_encoder(f"{t5},{clip}").encode(CAPTIONS)[0]
    assert torch.equal(pair.encode(CAPTIONS)[0].tokens, expected.tokens)
    assert torch.equal(pair.encode(CAPTIONS)[0].pooled, expected.pooled)
    before = pair.fingerprint()
    (tmp_path / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\n")
    assert pair.fingerprint() != before


def test_what_cannot_be_opened_is_named_in_one_line(tmp_path: Path, t5: Path, clip: Path) -> None:
    with pytest.raises(ConfigError, match=r"^encode.text: .*gives no pooled vector; a CLIP directory comes second$"):
        load_text_encoder(f"{clip},{t5}")
    with pytest.raises(ConfigError, match=r"^encode.text=a,b,c: one directory, or two"):
        load_text_encoder("a,b,c")
    with pytest.raises(ConfigError, match=r"^encode.text: .*nowhere holds no text encoder"):
        load_text_encoder(f"{t5},{tmp_path / 'nowhere'}")

    broken = tmp_path / "broken"
    shutil.copytree(clip, broken)
    (broken / "vocab.json").unlink()
    with pytest.raises(ConfigError, match=r"^encode.text: .*broken has no tokenizer.json or vocab.json$"):
        load_text_encoder(broken)
    shutil.copytree(clip, broken, dirs_exist_ok=True)

    weights = load_file(clip / "model.safetensors")
    name = next(name for name in weights if name.endswith("final_layer_norm.bias"))
    some = {key: weight for key, weight in weights.items() if key != name}
    for content in (some, some | {name: torch.zeros(7)}, None, b"no safetensors"):
        (broken / "model.safetensors").unlink(missing_ok=True)
        if isinstance(content, dict):
            save_file(content, broken / "model.safetensors", {"format": "pt"})
        elif content:
            (broken / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=r"^encode.text: .*broken") as caught:
            load_text_encoder(broken)
        assert "\n" not in str(caught.value)
        if content is some:
            assert "lacks 1 weights of a CLIPTextModel: final_layer_norm.bias" in str(caught.value)


def test_without_transformers_the_extra_is_named(t5: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for directory in (t5, clip):
        with pytest.raises(
            ConfigError, match=r"^encode.text: .* needs transformers: pip install 'megasora\[encoders\]'$"
        ):
            load_text_encoder(directory)


def test_loading_is_silent_and_leaves_the_logging_as_it_was(
    tmp_path: Path, t5: Path, clip: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Its other half, the vision model, is left out, which transformers reports at length.
    whole = save_clip(tmp_path / "whole", kind="clip")
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    capfd.readouterr()
    for directory in (t5, clip, whole):
        load_text_encoder(directory).encode(CAPTIONS)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == logging.INFO
    assert logging.is_progress_bar_enabled()
    logging.set_verbosity_warning()


def test_the_small_encoder_can_come_first(tmp_path: Path, clip: Path) -> None:
    SmallTextEncoder.create(CAPTIONS, width=32).save(tmp_path / "small")
    text = load_text_encoder(f"{tmp_path / 'small'},{clip}").encode(CAPTIONS)[0]
    assert (text.tokens.shape[1], text.pooled.shape[0]) == (32, 24)
